"""Gradients of tensors that scores read by the distance of query and key, against autograd through the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from checking import check_gradients
from plans import CASES, CAUSAL, Call, Sizes, power_keep, tensors

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.distance import DISTANCE, of_distance
from effattn.ir.expr import FloorDiv, IsPowerOfTwo, Modulo, Nk, Nq, b, h, k, load, q, s
from effattn.ir.plan import Plan
from effattn.lowering.kernels.generate import generate
from effattn.lowering.kernels.spec import KernelSpec, Tiles, WantedGradient
from effattn.runtime.targets import triton as triton_target

CPU = torch.device("cpu")
APART = q - k + Nk - 1  # from 0 on


def table(*indices, name="table"):
    return load(name, list(indices), integer=False)


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def learned(score, data, rule=CAUSAL):
    """A call with learned tensors of floats, and with other data, by name."""
    captures = tuple(CaptureSpec(name, str(each.dtype)[6:], each.ndim) for name, each in data.items())
    return Call(Plan("exact", AttentionSpec(score, rule, captures=captures)), list(data.values()))


BUCKET = load("bucket", [APART], integer=True)  # as in T5
SCORES = {
    "one for all heads": lambda n, d: (d * s + table(APART), {"table": numbers(n)}),
    "one for each head": lambda n, d: (d * s + table(h, APART), {"table": numbers(4, n)}),
    "one for each sequence": lambda n, d: (d * s + table(b, h, APART), {"table": numbers(2, 4, n)}),
    "last dimension": lambda n, d: (d * s + table(APART, h), {"table": numbers(n, 4)}),
    "clamped": lambda n, d: (d * s + table(h, sympy.Max(0, sympy.Min(8, q - k + 4))), {"table": numbers(4, 9)}),
    "both sides alike": lambda n, d: (d * s + table(sympy.Abs(q - k)), {"table": numbers(n)}),
    "buckets": lambda n, d: (
        d * s + table(BUCKET, h),
        {"bucket": torch.arange(n).sqrt().long(), "table": numbers(1 + int(n**0.5), 4)},
    ),
    "a factor of the score": lambda n, d: (d * s * table(APART), {"table": numbers(n)}),
    "within a soft-cap": lambda n, d: (3 * sympy.tanh(d * s + table(h, APART)), {"table": numbers(4, n)}),
    "times another": lambda n, d: (
        d * s + table(APART) * table(h, APART, name="other"),
        {"table": numbers(n), "other": numbers(4, n)},
    ),
    "read twice": lambda n, d: (d * s + table(APART) - 0.5 * table(sympy.Abs(q - k)), {"table": numbers(n)}),
    "beside a slope": lambda n, d: (
        d * s + table(APART) + table(h, name="slope") * k,
        {"table": numbers(n), "slope": numbers(4)},
    ),
    "beside a bias": lambda n, d: (
        d * s + table(h, APART) + table(0 * b, h, q, k, name="bias"),
        {"table": numbers(4, n), "bias": numbers(1, 4, n, n)},
    ),
}
RULES = {
    "all": sympy.true,
    "window": sympy.And(CAUSAL, q - k < 13),
    "two-sided window": sympy.And(k - q < 3, q - k < 20),
    "from the end": sympy.Le(k, q + Nk - Nq),
    "prefix": sympy.Or(CAUSAL, k < 5),
    "chunks": sympy.And(CAUSAL, sympy.Eq(FloorDiv(q, 24), FloorDiv(k, 24))),
    "power": sympy.And(CAUSAL, power_keep(16, 16, 3)),
    "strided": sympy.Eq(Modulo(q - k, 3), 0),
    "nothing": k < 0 * q - 3,
}


@pytest.mark.parametrize("name", SCORES)
def test_scores(name):
    sizes = Sizes(heads=4, kv_heads=2, q_len=27, k_len=27, value_dim=24)
    check_gradients(learned(*SCORES[name](53, sizes.scale)), tensors(sizes))


@pytest.mark.parametrize(("q_len", "k_len"), [(17, 40), (48, 33)])
@pytest.mark.parametrize("name", RULES)
def test_rules_and_lengths(name, q_len, k_len):
    sizes = Sizes(1, 4, 2, q_len, k_len)
    call = learned(*SCORES["one for each head"](q_len + k_len - 1, sizes.scale), RULES[name])
    check_gradients(call, tensors(sizes), through_lse=name != "nothing")


def test_one_query_and_key():
    sizes = Sizes(heads=4, kv_heads=1, q_len=1, k_len=1)
    check_gradients(learned(*SCORES["one for each head"](1, sizes.scale)), tensors(sizes))


@pytest.mark.parametrize("name", ["documents", "left_padding", "lengths_per_batch"])
def test_data_in_the_rule(name):
    sizes = Sizes(heads=4, kv_heads=2, q_len=60, k_len=60)
    masked = CASES[name](sizes, CPU)
    call = learned(*SCORES["one for each head"](119, sizes.scale), masked.plan.spec.predicate)
    captures = (*call.plan.spec.captures, *masked.plan.spec.captures)
    call.plan = replace(call.plan, spec=replace(call.plan.spec, captures=captures))
    call.captures += masked.captures
    check_gradients(call, tensors(sizes), config=None)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 60), (torch.bfloat16, 96), (torch.float32, 256)])
def test_dtypes(dtype, dim):
    sizes = Sizes(1, 4, 2, 33, 50, dim, dim)
    call = learned(*SCORES["one for each head"](82, sizes.scale))
    tolerance = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    check_gradients(call, tensors(sizes, dtype=dtype), tolerance, config=None)


@pytest.mark.parametrize("tile", [16, 32])
def test_dropout(tile):
    sizes = Sizes(1, 4, 2, 40, 60)
    call = learned(*SCORES["one for each head"](99, sizes.scale))
    call.plan = replace(call.plan, spec=replace(call.plan.spec, dropout=0.3).seeded)
    call.captures.append(torch.tensor(2**40 + 7))
    check_gradients(call, tensors(sizes), config=Tiles(16, tile, 4, 1))


def test_large_scores():
    """An LSE of a million keeps no digits of the logarithm of a sum."""
    sizes = Sizes(heads=4, kv_heads=2, q_len=40, k_len=40)
    call = learned(*SCORES["one for each head"](79, sizes.scale))
    call.captures[0] = call.captures[0].round() + 2.0**22
    query, key, value = tensors(sizes)
    check_gradients(call, [torch.zeros_like(query), key, value])  # scores that float32 holds exactly


def test_the_kernel_of_queries_and_keys_has_nothing_to_add():
    """It is the same as without the gradient, and the sums are no atomics: their order is one in every run."""
    attention = learned(*SCORES["one for each head"](85, 0.3)).plan.spec
    wanted = (WantedGradient("table", False),)
    made = KernelSpec("backward", "exact", attention, "bfloat16", 64, 64, 1, Tiles(16, 16, 4, 1))
    assert generate(replace(made, wanted=wanted)) == generate(made)
    text = generate(replace(made, kind="distances", wanted=wanted))
    assert "atomic" not in text
    assert "sum_0 +=" in text


def test_tiles_without_pairs_are_not_read():
    """Of chunks most tiles of a diagonal hold no pair, of a window most diagonals."""
    sizes = Sizes(1, 4, 2, 96, 96)
    for rule in (RULES["chunks"], RULES["window"]):
        call = learned(*SCORES["one for each head"](191, sizes.scale), rule)
        query, key, value = tensors(sizes)
        tiles = Tiles(16, 16, 4, 1)
        out, lse = triton_target.run(call.plan, query, key, value, call.captures, config=tiles, kind="prefill")
        key[:, :, :16], value[:, :, :16] = float("nan"), float("nan")
        given = (torch.ones_like(out), None, query, key, value, out, lse, call.captures, (), (), ["table"])
        query[:, :, :48], out[:, :, :48] = 0.0, 0.0
        lse[:, :, :48] = float("-inf")  # the queries that see these keys
        *_, (found,) = triton_target.run_backward(call.plan, *given, config=tiles)
        assert found[:, 95 + 48 :].isfinite().all()


TERMS = {
    q - k + 3: DISTANCE + 3,
    sympy.Le(k, q): DISTANCE >= 0,
    sympy.And(k <= q, q - k < 9): sympy.And(DISTANCE >= 0, DISTANCE < 9),
    IsPowerOfTwo(2 * q - 2 * k): IsPowerOfTwo(2 * DISTANCE),
    table(h, q - k): table(h, DISTANCE),
    table(load("bucket", [k - q], integer=True)): table(load("bucket", [-DISTANCE], integer=True)),
    q + k: None,
    FloorDiv(q, 16) - FloorDiv(k, 16): None,
    k < 5: None,
    sympy.Or(q - k < 3, k < 5): None,
    table(q, k): None,
}


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_terms_of_the_distance(term):
    found, expected = of_distance(term), TERMS[term]
    if expected is None:
        assert found is None
    else:
        assert not found.has(q, k)
        numbers = range(-12, 13)
        if expected.free_symbols == {DISTANCE}:
            assert [found.subs(DISTANCE, n) for n in numbers] == [expected.subs(DISTANCE, n) for n in numbers]
        else:
            assert found == expected
