"""The verifier notices every way of reading or rewriting wrongly that we can think of."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from torch._subclasses.fake_tensor import FakeTensorMode

from effattn.compiler import generators
from effattn.errors import VerificationError
from effattn.ir import expr
from effattn.passes.masks import split as masks
from effattn.passes.match import roles
from effattn.passes.symbolic import choices, elementwise, logic, reader

B, H, N, D = 2, 4, 13, 8


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def causal(q, k, v):
    i = torch.arange(N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=i[None] <= i[:, None])


def window(q, k, v):
    i = torch.arange(N)
    seen = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 4)
    return (q @ k.mT * 0.3).masked_fill(~seen, float("-inf")).softmax(-1) @ v


def padded(q, k, v):
    seen = torch.arange(N) < torch.tensor([[N], [0]])
    return (q @ k.mT * 0.3).masked_fill(~seen[:, None, None], torch.finfo(q.dtype).min).softmax(-1) @ v


def triangle(q, k, v):
    return (q @ k.mT * 0.3 + torch.full((N, N), float("-inf")).triu(1)).softmax(-1) @ v


def soft_cap(q, k, v):
    return (2 * torch.tanh(q @ k.mT / 2)).softmax(-1) @ v


def alibi(q, k, v):
    slopes = 2.0 ** -torch.arange(1, H + 1)
    return (q @ k.mT + slopes[:, None, None] * torch.arange(N)).softmax(-1) @ v


def documents(q, k, v):
    ids = torch.tensor([[0] * 6 + [1] * 7, [0] * 3 + [1] * 10])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(ids[:, :, None] == ids[:, None])[:, None])


def in_place(q, k, v):
    scores = q @ k.mT
    scores.mul_(0.3)
    return scores.softmax(-1) @ v


@pytest.fixture
def swap(monkeypatch):
    """Puts a wrong entry in a table, or a wrong function in a module."""

    def put(owner, name, value):
        if isinstance(owner, dict):
            monkeypatch.setitem(owner, name, value)
        else:
            monkeypatch.setattr(owner, name, value)

    return put


def wrong_triangle(reader, call, shape):
    reading = choices.triangle(reader, call, shape)
    return dataclasses.replace(reading, at=lambda index: reading.at((*index[:-1], index[-1] + 1)))


def wrong_split(change):
    def split(term):
        found = original_split(term)
        return dataclasses.replace(found, score=change(found.score))

    original_split = masks.split
    return split


def shifted_load(original):
    def at(self, node, time):
        reading = original(self, node, time)
        return dataclasses.replace(reading, at=lambda index: reading.at((*index[:-1], sympy.Max(index[-1] - 1, 0))))

    return at


SABOTAGE = {
    "le read as lt": (causal, logic._COMPARISONS, "le", sympy.Lt, "mask was read as"),
    "le read as ge": (causal, logic._COMPARISONS, "le", sympy.Ge, "mask was read as"),
    "lt read as le": (window, logic._COMPARISONS, "lt", sympy.Le, "mask was read as"),
    "and read as or": (window, logic._LOGIC, "and", sympy.Or, "mask was read as"),
    "eq read as le": (documents, logic._COMPARISONS, "eq", sympy.Le, "mask was read as"),
    "triangle off by one": (triangle, reader.HANDLERS, "triu", wrong_triangle, "mask was read as"),
    "captures shifted": (documents, reader.Reader, "_load", shifted_load(reader.Reader._load), "mask was read as"),
    "scale forgotten": (window, masks, "split", wrong_split(lambda score: score / 0.3), "output 0"),
    "scale in place forgotten": (in_place, elementwise._ARITHMETIC, "mul", lambda x, y: x, "output 0"),
    "tanh forgotten": (soft_cap, elementwise._ARITHMETIC, "tanh", lambda x: x, "output 0"),
    "slope of another head": (
        alibi,
        masks,
        "split",
        wrong_split(lambda score: score.subs(expr.h, (expr.h + 1))),
        "output 0",
    ),
    "empty rows zero": (padded, masks, "empty_rows", lambda *args, **kwargs: "zero", "output 0"),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_it_notices(name, swap):
    function, owner, entry, value, message = SABOTAGE[name]
    compiled(function, *qkv())  # right without the sabotage
    swap(owner, entry, value)
    with pytest.raises(VerificationError, match=message) as raised:
        compiled(function, *qkv())
    assert "test_verify.py" in str(raised.value) or message == "output 0"


def test_heads_and_batch_mixed_up(swap):
    original = roles.traced

    def mixed_up(view, node, index, time, name, *more, **named):
        found = original(view, node, index, time, name, *more, **named)
        batch, (heads,), rows, depth = found.dims
        return dataclasses.replace(found, dims=(heads, (batch,), rows, depth)) if name == "key" else found

    def function(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    given = [x[:, :B] for x in qkv()]  # as many heads as sequences
    compiled(function, *given)
    swap(roles, "traced", mixed_up)
    with pytest.raises(VerificationError, match="output 0"):
        compiled(function, *given)


def test_transpose_of_a_mask_forgotten(swap):
    def function(q, k, v):
        mask = (torch.arange(N)[None] >= torch.arange(N)[:, None]).transpose(0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    compiled(function, *qkv())
    swap(reader.HANDLERS, "transpose", lambda reader, call, shape: reader.argument(call, "input"))
    with pytest.raises(VerificationError, match="mask was read as"):
        compiled(function, *qkv())


def with_dropout(q, k, v):
    return F.dropout(window(F.dropout(q, 0.5), k, v), 0.5)


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_random_numbers_are_those_of_a_call_without_it(rest):
    torch.manual_seed(3)
    expected = with_dropout(*qkv())
    after = torch.rand(3)
    for verify in (False, True) if rest == "eager" else (True,):
        torch._dynamo.reset()
        options = {"rest": rest, "strict": True, "verify": verify}
        fast = torch.compile(with_dropout, backend="effattn", options=options)
        torch.manual_seed(3)
        assert_close(fast(*qkv()), expected)
        torch.testing.assert_close(torch.rand(3), after, rtol=0, atol=0)


def test_generators_of_all_devices_of_a_graph_are_restored(monkeypatch):
    with FakeTensorMode() as mode:
        values = [torch.empty(2, device=name) for name in ("cpu", "cuda:0", "cuda:1", "meta")]
    graph = torch.fx.Graph()
    for number, value in enumerate(values):
        graph.placeholder(f"x{number}").meta["example_value"] = value if number else (value, mode)
    devices = generators.devices_of(graph)
    assert [str(device) for device in devices] == ["cpu", "cuda:0", "cuda:1"]

    held = {"cuda:0": 1, "cuda:1": 2}

    class Cuda:
        def get_rng_state(self, device):
            return held[str(device)]

        def set_rng_state(self, state, device):
            held[str(device)] = state

    monkeypatch.setattr(torch, "get_device_module", lambda device: Cuda())
    saved = generators.states(devices)
    drawn = torch.rand(1)
    held.update({"cuda:0": 5, "cuda:1": 6})
    generators.restore(saved)
    assert held == {"cuda:0": 1, "cuda:1": 2}
    assert torch.equal(torch.rand(1), drawn)


def test_sdpa_with_arguments_by_name():
    def function(q, k, v):
        mask = torch.arange(N)[None] <= torch.arange(N)[:, None]
        return F.scaled_dot_product_attention(value=v, key=k, query=q, attn_mask=mask)

    compiled(function, *qkv())


def test_large_scores_in_half_precision():
    """User code rounds scores about 300 to multiples of two, and weights differ by as much as their scores."""

    def function(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    q, k, v = (x.bfloat16() for x in qkv())
    q[..., 0], k[..., 0] = 20, 15
    compiled(function, q, k, v, tolerance=1.0)


def test_half_precision_inside_and_single_outside():
    """What is cast at the end is as exact as it was before."""

    def function(q, k, v):
        return ((q.bfloat16() * 3) @ k.bfloat16().mT).softmax(-1) @ v.bfloat16()

    compiled(lambda *x: function(*x).float(), *qkv(), tolerance=0.1)


def test_an_infinite_output_does_not_hide_a_wrong_one(swap):
    """As large as anything, so that any error is small beside it."""

    def function(q, k, v):
        return torch.cat([window(q, k, v), v / 0], dim=-1)

    compiled(function, *qkv())
    swap(masks, "split", wrong_split(lambda score: score / 0.3))
    with pytest.raises(VerificationError, match="output 0"):
        compiled(function, *qkv())
