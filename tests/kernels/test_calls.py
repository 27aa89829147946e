"""Calls that share a launch, and those that must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checking import check
from plans import CASES, Sizes, tensors

from effattn.lowering.kernels.spec import Tiles
from effattn.runtime import launching
from effattn.runtime.targets import triton as triton_target
from effattn.runtime.targets.triton.limits import UnsupportedCall

CPU = torch.device("cpu")
SMALL = Tiles(16, 16, 4, 1)


@pytest.fixture(autouse=True)
def nothing_remembered():
    triton_target.forget()


def remembered() -> int:
    return len(triton_target.CALLS)


def test_same_shapes_share_a_launch():
    sizes = Sizes(q_len=20, k_len=20)
    call = CASES["left_padding"](sizes, CPU)
    for seed in range(3):
        call.captures = [torch.roll(call.captures[0], seed, 1)]
        check(call, *tensors(sizes, seed=seed), config=SMALL, kind="prefill")
    assert remembered() == 1


def test_lengths_strides_dtypes_and_alignment_do_not():
    call = CASES["causal_from_the_end"](Sizes(), CPU)
    for k_len in (20, 21, 36):
        sizes = Sizes(q_len=20, k_len=k_len)
        check(call, *tensors(sizes), config=SMALL, kind="prefill")
    sizes = Sizes(q_len=20, k_len=20)
    check(call, *tensors(sizes, order="bnhd"), config=SMALL, kind="prefill")
    check(call, *tensors(sizes, dtype=torch.float16), 5e-3, config=SMALL, kind="prefill")
    query, key, value = tensors(sizes)
    unaligned = torch.empty(query.numel() + 1)[1:].view(query.shape).copy_(query)
    check(call, unaligned, key, value, config=SMALL, kind="prefill")
    assert remembered() == 6


def test_values_of_scalars_and_numbers_do_not_matter():
    sizes = Sizes(q_len=20, k_len=40)
    call = CASES["power_at_an_offset"](sizes, CPU)
    for start in (0, 7, 20):
        call.scalars = [start]
        check(call, *tensors(sizes), config=SMALL, kind="prefill")
    assert remembered() == 1
    call = CASES["scale_at_run_time"](sizes, CPU)
    for scale in (0.5, -0.1, 1):  # an integer is a number too
        call.numbers = [scale]
        check(call, *tensors(sizes), config=SMALL, kind="prefill")
    assert remembered() == 2


def test_a_plan_that_is_gone_is_not_confused_with_another():
    sizes = Sizes(batch=1, heads=1, q_len=20, k_len=20)
    for scale in range(1, 30):
        plan = CASES["causal"](sizes, CPU).plan
        call = CASES["causal"](sizes, CPU)
        call.plan = replace(plan, spec=replace(plan.spec, score=plan.spec.score * scale / 10))
        check(call, *tensors(sizes), config=SMALL, kind="prefill")


def test_checks_are_made_for_each_shape():
    sizes = Sizes(q_len=20, k_len=20)
    call = CASES["left_padding"](sizes, CPU)
    check(call, *tensors(sizes), config=SMALL, kind="prefill")
    with pytest.raises(UnsupportedCall, match="padding"):
        triton_target.run(call.plan, *tensors(sizes), [call.captures[0][:, :10]])


def test_memory_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(launching, "MOST_CALLS", 3)
    for k_len in range(20, 28):
        sizes = Sizes(batch=1, heads=1, q_len=20, k_len=k_len)
        check(CASES["none"](sizes, CPU), *tensors(sizes), config=SMALL, kind="prefill")
        assert remembered() <= 3
