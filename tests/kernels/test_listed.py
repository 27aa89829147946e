"""Attention over block lists on Triton's interpreter, against the portable target (held to float64 elsewhere)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from comparing import assert_close
from sites import causal_site

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import Nk, Nq, b, k, load, q, s
from effattn.ir.plan import Plan, Sparsity
from effattn.lowering.forms import FORMS
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime.targets import portable
from effattn.runtime.targets import triton as triton_target

CASES = {
    "units_of_a_tile": ("proxy", {"block": 16, "stride": 4, "least": 32, "gamma": 0.7}),
    "units_of_two_tiles": ("proxy", {"block": 32, "stride": 4, "least": 32, "gamma": 0.7}),
    "rows_of_two_tiles": ("dhsa", {"block": 32, "unit": 16, "share": 0.4, "local": 16, "sinks": 16}),
    "units_below_a_tile": ("dhsa", {"block": 16, "unit": 16, "share": 0.4, "local": 16, "sinks": 16}),
    "tokens": ("dhsa", {"block": 16, "unit": 1, "budget": 37, "chunk": 11, "local": 20, "sinks": 3}),
}
TILES = {"units_below_a_tile": Tiles(16, 32, 4, 1)}
FROM_THE_END = k <= q + Nk - Nq


def plan_of(name: str, predicate=FROM_THE_END, captures=(), score=0.3 * s) -> Plan:
    form, params = CASES[name]
    chosen = FORMS[form]
    return Plan(
        form,
        AttentionSpec(score, predicate, captures=captures),
        Sparsity(chosen.selector(chosen.params(**params), causal_site())),
    )


def made(q_len=70, k_len=90, heads=4, kv_heads=2, dim=16, value_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim))
    return [torch.randn(2, *shape, generator=generator).to(dtype) for shape in shapes]


def compare(name: str, plan: Plan, inputs, captures=(), tolerance=None):
    out, lse = triton_target.run(plan, *inputs, captures, config=TILES.get(name, Tiles(16, 16, 4, 1)))
    wanted, wanted_lse = portable.run(plan, *inputs, captures)
    assert_close(out, wanted, tolerance)
    assert_close(lse, wanted_lse, tolerance)


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (17, 17), (70, 90), (64, 64), (40, 20)])
@pytest.mark.parametrize("name", CASES)
def test_lengths(name, q_len, k_len):
    compare(name, plan_of(name), made(q_len, k_len, heads=2, kv_heads=1))


@pytest.mark.parametrize(("dim", "value_dim"), [(60, 60), (64, 96), (128, 128)])
@pytest.mark.parametrize("name", ["units_of_a_tile", "tokens"])
def test_head_dimensions(name, dim, value_dim):
    compare(name, plan_of(name), made(33, 50, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("name", ["units_of_a_tile", "units_below_a_tile", "tokens"])
def test_groups(name, groups):
    compare(name, plan_of(name), made(24, 40, heads=2 * groups))


@pytest.mark.parametrize("empty_rows", ["zero", "nan", "mean"])
def test_padding(empty_rows):
    padding = torch.arange(90) >= torch.tensor([0, 75])[:, None]
    seen = sympy.Ne(load("padding", [b, k], integer=True), 0)
    plan = plan_of("units_of_a_tile", sympy.And(FROM_THE_END, seen), (CaptureSpec("padding", "bool", 2),))
    compare("units_of_a_tile", replace(plan, spec=replace(plan.spec, empty_rows=empty_rows)), made(), [padding])


def test_soft_cap():
    compare("units_of_a_tile", plan_of("units_of_a_tile", score=20 * sympy.tanh(s / 20)), made())


def test_a_position_on_the_device():
    """A cache of 90 slots of which 75 are filled: the position is read by pointer."""
    live = load("live", [], integer=True)
    plan = plan_of("units_of_a_tile", k <= q + live, (CaptureSpec("live", "int64", 0),))
    compare("units_of_a_tile", plan, made(), [torch.tensor(5)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = made(40, 40, dtype=dtype)
    plan = plan_of("units_below_a_tile")
    out, _ = triton_target.run(plan, *inputs, config=TILES["units_below_a_tile"])
    wanted, _ = portable.run(plan, *inputs)
    assert_close(out, wanted, 2e-2)
