"""The prefill kernel on Triton's interpreter against the definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from checking import check
from comparing import assert_close
from plans import CASES, Sizes, tensors

from effattn.ir import expr
from effattn.ir.refusal import Why
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime.targets import triton as triton_target
from effattn.runtime.targets.triton.limits import UnsupportedCall

CPU = torch.device("cpu")
SMALL = Tiles(16, 16, 4, 1)


@pytest.mark.parametrize("name", CASES)
def test_every_plan(name):
    sizes = Sizes()
    check(CASES[name](sizes, CPU), *tensors(sizes), config=SMALL, kind="prefill")


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (17, 17), (1, 40), (40, 17), (33, 90), (64, 64)])
@pytest.mark.parametrize("name", ["none", "causal_from_the_end", "power_by_pointer", "window_and_sinks", "bias"])
def test_lengths(name, q_len, k_len):
    sizes = Sizes(q_len=q_len, k_len=k_len)
    check(CASES[name](sizes, CPU), *tensors(sizes), config=SMALL, kind="prefill")


@pytest.mark.parametrize("start", range(0, 40, 7))
def test_rows_start_anywhere_in_a_block(start):
    """The first tile is shifted so that no tile straddles two blocks of absolute position."""
    sizes = Sizes(batch=1, heads=1, q_len=37, k_len=37 + start)
    check(CASES["power_at_an_offset"](sizes, CPU), *tensors(sizes), config=Tiles(16, 16, 4, 1), kind="prefill")
    check(CASES["power_by_pointer"](sizes, CPU), *tensors(sizes), config=Tiles(16, 16, 4, 1), kind="prefill")


@pytest.mark.parametrize(("head_dim", "value_dim"), [(60, 60), (64, 96), (96, 64), (8, 24), (128, 128)])
@pytest.mark.parametrize("name", ["causal", "empty_rows_mean"])
def test_head_dimensions(name, head_dim, value_dim):
    sizes = Sizes(batch=1, head_dim=head_dim, value_dim=value_dim)
    check(CASES[name](sizes, CPU), *tensors(sizes), config=SMALL, kind="prefill")


@pytest.mark.parametrize("groups", [1, 3, 4, 8])
@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_groups(name, groups):
    sizes = Sizes(heads=2 * groups, kv_heads=2, q_len=35, k_len=35)
    check(CASES[name](sizes, CPU), *tensors(sizes), config=SMALL, kind="prefill")


@pytest.mark.parametrize("order", ["bnhd", "bhdn", "nhbd", "dnbh"])
def test_strides(order):
    sizes = Sizes(q_len=40, k_len=50, heads=4, kv_heads=2)
    check(CASES["left_padding"](sizes, CPU), *tensors(sizes, order=order), config=SMALL, kind="prefill")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "soft_cap", "power_16", "empty_rows_mean"])
def test_half_precision(name, dtype):
    sizes = Sizes()
    tolerance = 5e-3 if dtype == torch.float16 else 3e-2
    check(CASES[name](sizes, CPU), *tensors(sizes, dtype=dtype), tolerance=tolerance, config=SMALL, kind="prefill")


@pytest.mark.parametrize("tiles", [Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 32, 4, 1)])
@pytest.mark.parametrize(
    "name", ["causal_from_the_end", "window_and_sinks", "power_16", "power_32_no_sinks", "chunked"]
)
def test_tile_sizes(name, tiles):
    """Tiles larger than the blocks of a list too: then all tiles of the band are visited and tested."""
    sizes = Sizes(batch=1, q_len=70, k_len=90)
    check(CASES[name](sizes, CPU), *tensors(sizes), config=tiles, kind="prefill")


@pytest.mark.parametrize("together", [0, 1, 3, 4, 99])
def test_heads_side_by_side(together):
    """Every tile of every head is computed, whatever number of heads starts side by side."""
    sizes = Sizes(batch=2, heads=4, kv_heads=2, q_len=40, k_len=40)
    tiles = Tiles(16, 16, 4, 1, heads_together=together)
    check(CASES["causal"](sizes, CPU), *tensors(sizes), config=tiles, kind="prefill")


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_memory_order_of_the_output(layout):
    sizes = Sizes(q_len=20, k_len=20, heads=4)
    call = CASES["causal"](sizes, CPU)
    call.plan = call.plan.dispatched(layout=layout)
    out, _ = check(call, *tensors(sizes), config=SMALL, kind="prefill")
    assert (out if layout == "bhnd" else out.transpose(1, 2)).is_contiguous()


def test_below_its_least_length_a_form_keeps_everything():
    sizes = Sizes()
    plan = CASES["window"](sizes, CPU).plan
    exact = CASES["causal"](sizes, CPU).plan
    inputs = tensors(sizes)
    wanted, _ = triton_target.run(exact, *inputs, config=SMALL)
    short, _ = triton_target.run(plan.dispatched(min_length=58), *inputs, config=SMALL)
    long, _ = triton_target.run(plan.dispatched(min_length=57), *inputs, config=SMALL)
    assert_close(short, wanted)
    assert (long - wanted).abs().max() > 1e-2


def test_data_that_is_broadcast():
    """A padding mask that all batches share has size 1 there."""
    sizes = Sizes()
    call = CASES["left_padding"](sizes, CPU)
    call.captures = [call.captures[0][1:]]
    check(call, *tensors(sizes), config=SMALL, kind="prefill")


def test_no_rows_and_no_keys():
    none, empty = Sizes(q_len=0), Sizes(k_len=0)
    out, lse = triton_target.run(CASES["causal"](none, CPU).plan, *tensors(none), config=SMALL)
    assert out.shape == (2, 2, 0, 16)
    assert lse.shape == (2, 2, 0)
    plan = CASES["causal"](empty, CPU).plan
    plan = replace(plan, spec=replace(plan.spec, empty_rows="zero"))
    out, lse = triton_target.run(plan, *tensors(empty))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_what_kernels_do_not_serve():
    sizes = Sizes()
    query, key, value = tensors(sizes)
    causal = CASES["causal"](sizes, CPU).plan
    with pytest.raises(UnsupportedCall, match="float64"):
        triton_target.run(causal, query.double(), key.double(), value.double())
    with pytest.raises(UnsupportedCall, match="share a dtype"):
        triton_target.run(causal, query, key.half(), value)
    padded = CASES["left_padding"](sizes, CPU)
    with pytest.raises(UnsupportedCall, match="padding"):
        triton_target.run(padded.plan, query, key, value, [padded.captures[0][:, :50]])
    assert triton_target.why_not(causal.spec, torch.bfloat16, 1024, 64).rule == Why.HEAD_DIM
    strange = replace(causal.spec, score=sympy.besselj(0, expr.s))
    refusal = triton_target.why_not(strange, torch.bfloat16, 64, 64)
    assert refusal.rule == Why.EXPRESSION
    assert "besselj" in refusal.reason
