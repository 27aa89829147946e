"""What is read must be what was there when the user read it, whoever writes: caches, counters, foreign code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from small import INF, MIN, B, D, H, N, qkv, tensors

from effattn.ir.refusal import Why


def run_several_times(function, *args: Any, calls: int = 3) -> None:
    """Like the model itself over several calls, its buffers included."""
    from effattn.compiler.backend import effattn

    torch._dynamo.reset()
    expected_args, actual_args = copy.deepcopy(args), copy.deepcopy(args)
    fast = torch.compile(
        function, backend=lambda gm, inputs: effattn(gm, inputs, options={"rest": "eager", "strict": True})
    )
    for _ in range(calls):
        expected, actual = function(*expected_args), fast(*actual_args)
        assert_close(actual, expected)
        assert_close(actual_args, expected_args)


def counter_raised_after_the_mask(q, k, v, length):
    i = torch.arange(N)
    mask = i[None] <= i[:, None] % 3 + length
    length.add_(2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 1, N, N))


def counter_read_before_and_after(q, k, v, length):
    i = torch.arange(N)
    late = i[None] >= length - 3
    length.add_(2)
    mask = (i[None] <= i[:, None] + length) & late
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 1, N, N))


def counter_read_after_and_before(q, k, v, length):
    i = torch.arange(N)
    before = length + 0 * i
    length.add_(2)
    mask = (i[None] <= i[:, None] + length) & (i[None] >= before - 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 1, N, N))


def counter_raised_twice(q, k, v, length):
    i = torch.arange(N)
    length.add_(1)
    first = F.scaled_dot_product_attention(q, k, v, attn_mask=(i[None] <= i[:, None] + length).expand(1, 1, N, N))
    length.add_(1)
    mask = (i[None] <= i[:, None] - 4 + length).expand(1, 1, N, N)
    return first + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def mask_changed_through_a_view(q, k, v, mask):
    seen = mask[:, None, None, :]
    scores = (q @ k.mT).masked_fill(~seen, -INF)
    mask.view(-1)[1:].copy_(mask.view(-1)[:-1].clone())
    return scores.softmax(-1) @ v


def slopes_changed_between(q, k, v, slopes):
    scores = q @ k.mT + slopes[:, None, None] * torch.arange(N)
    slopes.mul_(2)
    return scores.softmax(-1) @ v


def other_product_changed_in_place(q, k, v, slopes):
    other = v @ slopes.expand(D, H)[:, :1]  # [B, H, N, 1]: per row, no score of its own
    scores = q @ k.mT + other
    other.mul_(3)
    return scores.softmax(-1) @ v, other


@pytest.mark.parametrize(
    "function",
    [counter_raised_after_the_mask, counter_read_before_and_after, counter_read_after_and_before, counter_raised_twice],
    ids=lambda function: function.__name__,
)
def test_a_counter_is_read_when_the_author_reads_it(function):
    run_several_times(function, *qkv(), torch.tensor(3))
    report, _ = compiled(function, *qkv(), torch.tensor(3))
    assert report.missed == []


def test_data_changed_between_mask_and_attention():
    run_several_times(mask_changed_through_a_view, *qkv(), torch.arange(N) < torch.tensor([[N], [5]]))
    run_several_times(slopes_changed_between, *qkv(), torch.tensor([0.5, 0.25, 0.125]))
    run_several_times(other_product_changed_in_place, *qkv(), torch.tensor([0.5, 0.25, 0.125]))


def test_inputs_that_overlap():
    cache = tensors((2, B, H, N, D))[0]

    def function(q, cache, k, v):
        weights = (q @ k.mT).softmax(-1)
        cache[0].mul_(2)  # this is the key
        return weights @ v

    q = qkv()[0]
    run_several_times(function, q, cache, cache[0], cache[1])
    report, _ = compiled(function, q, cache, cache[0], cache[1])  # the copies that the helper makes do not overlap
    assert report.missed == []


def cache_written_at_a_position(q, k, v, keys, values, position):
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    mask = torch.arange(keys.shape[2])[None] <= position[:, None]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def cache_set(q, k, v, keys, values, position):
    keys[:, :, position] = k
    values[:, :, position] = v
    position.add_(1)
    mask = torch.arange(keys.shape[2])[None] < position[:, None]
    return (q @ keys.mT).masked_fill(~mask, MIN).softmax(-1) @ values


@pytest.mark.parametrize("function", [cache_written_at_a_position, cache_set], ids=lambda function: function.__name__)
def test_a_cache_is_written_before_it_is_read(function):
    q, k, v = (x[:, :, :2] for x in qkv())
    keys, values = tensors((), ())
    run_several_times(function, q, k, v, keys, values, torch.tensor([3, 4]))


@torch.library.custom_op("effattn_tests::double_in_place", mutates_args=("x",))
def double_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


@double_in_place.register_fake
def _(x):
    return None


def test_a_custom_operator_that_writes_the_scores():
    def function(q, k, v):
        scores = q @ k.mT
        double_in_place(scores)
        return scores.softmax(-1) @ v

    report, _ = compiled(function, *qkv())
    assert report.missed[0].rule == Why.MEMORY


def test_a_custom_operator_that_writes_the_key():
    def function(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        torch.ops.effattn_tests.double_in_place(k.view(-1))
        return weights @ v

    report, _ = compiled(function, *qkv())
    assert report.missed[0].rule == Why.MEMORY
    assert report.missed[0].cause.startswith(f"{__file__}:")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def test_a_function_with_its_own_gradient():
    def function(q, k, v):
        return Doubled.apply(q @ k.mT).softmax(-1) @ v

    report, _ = compiled(function, *[x.requires_grad_() for x in qkv()])
    assert report.sites == []
    assert report.missed[0].rule == Why.NO_PRODUCT


def allowed(x):
    x.add_(1)
    return x.sum()


def test_a_foreign_function_may_do_anything():
    def function(q, k, v):
        scores = q @ k.mT
        torch.compiler.allow_in_graph(allowed)
        total = allowed(scores)
        return scores.softmax(-1) @ v + total

    report, _ = compiled(function, *qkv())
    assert report.sites == []


@pytest.mark.parametrize("spelling", ["softmax", "sdpa"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "vjp"])
def test_attention_under_torch_func_does_not_keep_other_attention_from_being_found(spelling, transform):
    def attention(x):
        if spelling == "sdpa":
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return (x @ x.mT).softmax(-1) @ x

    transformed = {
        "vmap": torch.vmap(attention),
        "grad": torch.func.grad(lambda x: attention(x).sum()),
        "vjp": lambda x: torch.func.vjp(attention, x)[0],
    }[transform]
    report, _ = compiled(lambda x: transformed(x) + attention(x.sin()), qkv()[0], verify=False)
    assert len(report.sites) == 1
    assert [missed.reason for missed in report.missed] == [
        "it runs inside a transformation of torch.func (vmap, grad, jvp)"
    ]


@pytest.mark.parametrize("spelling", ["softmax", "sdpa"])
def test_autocast(spelling):
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            if spelling == "sdpa":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            scores = q @ k.mT * 0.25 + torch.full((N, N), -INF).triu(1)
            return scores.softmax(-1) @ v

    report, out = compiled(function, *qkv(), tolerance=3e-2)
    assert out.dtype == torch.bfloat16
    assert [site.predicate for site in report.sites] == ["k <= q"], report.missed


def test_a_tensor_whose_shape_changes_in_place():
    def function(q, k, v):
        q = q.clone()
        scores = q @ k.mT
        q.transpose_(2, 3)
        return (scores).softmax(-1) @ v + q.mT

    compiled(function, *qkv())
