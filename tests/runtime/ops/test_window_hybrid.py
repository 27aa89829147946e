"""Softmax in a window, linear attention before it: what is computed is the float64 definition, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close

from effattn.lowering.forms.feature_maps import FEATURE_MAPS
from effattn.runtime.ops.feature_attention import feature_attention
from effattn.runtime.ops.window_hybrid import window_hybrid
from effattn.runtime.reference.hybrid import hybrid, masks
from effattn.runtime.targets import window_blocks


def made(length, heads=4, kv_heads=2, dim=16, value_dim=8, features=12, batch=2, dtype=torch.float32, seed=0):
    """query, key, value, their features, and gamma by head."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        random(batch, heads, length, dim),
        random(batch, kv_heads, length, dim),
        random(batch, kv_heads, length, value_dim),
        random(batch, heads, length, features).abs(),
        random(batch, kv_heads, length, features).abs(),
        torch.rand(heads, generator=generator) * 0.9 + 0.05,
    ]


def published(query, key, value, of_query, of_key, gamma, window, terraced, scale):
    """The authors' masks and formula as they write them, for whole blocks, more than one."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value, of_key = (tensor.repeat_interleave(groups, 1) for tensor in (key, value, of_key))
    if terraced:
        blocks = torch.block_diag(*[torch.ones(window, window)] * (length // window))
        blocks = blocks + torch.roll(blocks, -window, -1)
        near, far = blocks.tril().bool(), (1 - blocks).tril().bool()
    else:
        far = torch.ones(length, length).tril(-window).bool()
        near = torch.ones(length, length).tril().bool() & ~far
    soft = (query @ key.mT * scale).masked_fill(~near, -1e8)
    soft = gamma[:, None, None] * (soft - soft.amax(-1, keepdim=True)).exp()
    weights = soft + (of_query @ of_key.mT).masked_fill(~far, 0)
    return weights @ value / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("terraced", [False, True])
@pytest.mark.parametrize(("length", "window"), [(24, 8), (64, 16), (32, 16), (12, 4)])
def test_the_definition_is_the_published_one(length, window, terraced):
    given = [tensor.double() for tensor in made(length)]
    wanted = published(*given, window, terraced, 0.3)
    assert_close(hybrid(*given, window=window, terraced=terraced, scale=0.3), wanted)


@pytest.mark.parametrize("terraced", [False, True])
@pytest.mark.parametrize(
    ("length", "window"),
    [(1, 1), (1, 8), (7, 8), (8, 8), (9, 8), (16, 8), (17, 8), (33, 7), (90, 1), (131, 64), (300, 3)],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_it_is_the_definition(length, window, terraced, heads, kv_heads):
    given = made(length, heads, kv_heads)
    out = window_hybrid(*given, window, terraced, 0.4)
    wanted = hybrid(*given, window=window, terraced=terraced, scale=0.4)
    assert_close(out, wanted, exact_dtype=False)
    wide = [tensor.double() for tensor in given]
    assert_close(window_hybrid(*wide, window, terraced, 0.4), wanted, 1e-9)


@pytest.mark.parametrize("terraced", [False, True])
def test_every_earlier_key_has_one_weight(terraced):
    """Window and rest part what causality allows."""
    for q_len, k_len in ((50, 50), (7, 50), (50, 7)):
        near, far = masks(q_len, k_len, 8, terraced)
        allowed = torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len
        assert torch.equal(near | far, allowed)
        assert not (near & far).any()


@pytest.mark.parametrize("terraced", [False, True])
def test_within_the_window_it_is_softmax_attention(terraced):
    given = made(30)
    out = window_hybrid(*given, 32, terraced, 0.25)
    wanted = F.scaled_dot_product_attention(*given[:3], is_causal=True, enable_gqa=True, scale=0.25)
    assert_close(out, wanted)


def test_great_scores_and_features_stay_finite():
    query, key, value, of_query, of_key, gamma = made(100)
    given = (query * 100, key * 100, value, of_query * 1e3, of_key * 1e3, gamma)
    out = window_hybrid(*given, 16)
    assert_close(out, hybrid(*given, window=16), 1e-4, exact_dtype=False)
    nothing = (query, key, value, of_query * 0, of_key * 0, gamma)
    assert_close(window_hybrid(*nothing, 16), hybrid(*nothing, window=16), exact_dtype=False)


@pytest.mark.parametrize("terraced", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_in_half_precision(dtype, tolerance, terraced):
    given = made(600, dtype=dtype, features=32, batch=1)
    given[3], given[4] = given[3] * 4, given[4] * 4  # sums beyond what float16 holds
    out = window_hybrid(*given, 64, terraced, 0.3)
    assert out.dtype == dtype
    wanted = hybrid(*given, window=64, terraced=terraced, scale=0.3)
    assert_close(out, wanted, tolerance, exact_dtype=False)


@pytest.mark.parametrize("terraced", [False, True])
@pytest.mark.parametrize(("length", "window"), [(37, 8), (20, 32)])
def test_gradients_are_the_definition_s(length, window, terraced):
    given = [tensor.double().requires_grad_() for tensor in made(length)]
    grad = torch.randn(2, 4, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    wanted = torch.autograd.grad(
        hybrid(*given, window=window, terraced=terraced, scale=0.4), given, grad, materialize_grads=True
    )
    got = torch.autograd.grad(window_hybrid(*given, window, terraced, 0.4), given, grad, materialize_grads=True)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("length", [0, 1, 20])
def test_the_op_is_what_torch_expects(length, layout):
    given = [tensor.requires_grad_() for tensor in made(length)]
    torch.library.opcheck(torch.ops.effattn.window_linear.default, (*given, 8, True, 0.5, layout))


def test_what_a_wrong_call_gets():
    query, key, value, of_query, of_key, gamma = made(20)
    for given, window, reason in (
        ((query, key, value, of_query, of_key, gamma), 0, "at least one key"),
        ((query, key[:, :, 1:], value[:, :, 1:], of_query, of_key[:, :, 1:], gamma), 4, "shapes do not fit"),
        ((query, key, value, of_query[:, :, 1:], of_key, gamma), 4, "beside query and key"),
        ((query, key, value, of_query[..., 1:], of_key, gamma), 4, "features or heads"),
        ((query, key, value.double(), of_query, of_key, gamma), 4, "share a floating point dtype"),
        ((query, key, value, of_query, of_key, gamma[1:]), 4, "a float per query head"),
    ):
        with pytest.raises(ValueError, match=reason):
            window_hybrid(*given, window)


def test_memory_order_of_the_output():
    given = made(20)
    out = window_hybrid(*given, 4, layout="bnhd")
    assert out.transpose(1, 2).is_contiguous()
    assert_close(out, window_hybrid(*given, 4))


@pytest.mark.parametrize("terraced", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(40, 40), (7, 40), (40, 7), (1, 40)])
def test_other_numbers_of_queries(q_len, k_len, terraced):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, q_len, 16), torch.randn(2, 2, k_len, 16), torch.randn(2, 2, k_len, 8)
    gamma = torch.rand(4)
    asked = {"window": 8, "terraced": terraced, "gamma": gamma}
    out = feature_attention(query, key, value, "elu_plus_one", **asked)
    phi = FEATURE_MAPS["elu_plus_one"]
    wanted = hybrid(query, key, value, phi(query), phi(key), gamma, window=8, terraced=terraced, scale=0.25)
    assert_close(out, wanted, exact_dtype=False)
    with pytest.raises(ValueError, match="is causal"):
        feature_attention(query, key, value, "elu_plus_one", causal=False, **asked)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_all_lengths(backend):
    torch._dynamo.reset()
    fast = torch.compile(window_hybrid, backend=backend, fullgraph=True, dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (40, 57, 8, 130):
        given = made(length)
        for tensor in given[:5]:
            torch._dynamo.mark_dynamic(tensor, 2)
        assert_close(fast(*given, 8, True), window_hybrid(*given, 8, True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.parametrize("terraced", [False, True])
def test_with_the_kernels_of_linear_attention(terraced):
    """On a CPU by Triton's interpreter."""
    given = [tensor.requires_grad_() for tensor in made(50, heads=2, kv_heads=1, batch=1)]
    grad = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(5))
    portable, kernels = (window_hybrid(*given, 8, terraced, 0.4, "bhnd", target) for target in ("portable", "triton"))
    assert_close(kernels, portable)
    found = [torch.autograd.grad(out, given, grad) for out in (kernels, portable)]
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-4)


def test_pieces_are_the_whole(monkeypatch):
    given = [tensor.double().requires_grad_() for tensor in made(100)]
    grad = torch.randn(2, 4, 100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = []
    for elements in (2**26, 1):
        monkeypatch.setattr(window_blocks, "ELEMENTS", elements)
        out = window_hybrid(*given, 16)
        found.append((out, *torch.autograd.grad(out, given, grad)))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)
