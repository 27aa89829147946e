"""Keys that forms keep: windows and lists of blocks."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import FloorDiv, IsPowerOfTwo, Table, h, k, load, q, s, scalar
from effattn.ir.plan import Plan
from plans.calls import CAUSAL, Call, case, power_keep


@case
def window(sizes, device):
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, q - k < 13)))


@case
def window_and_sinks(sizes, device):
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, sympy.Or(q - k < 10, k < 5))))


@case
def wide_window(sizes, device):
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, q - k < 37)))


@case
def wide_window_and_sinks(sizes, device):
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, sympy.Or(q - k < 37, k < 7))))


@case
def window_per_head(sizes, device):
    """Windows that are known when compiling, one for each head; the last serves all heads beyond."""
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, q - k < Table(h, 5, 30, 30, 1 << 20))))


@case
def power_16(sizes, device):
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, power_keep(16, 32, 7))))


@case
def power_32_no_sinks(sizes, device):
    distance = FloorDiv(q, 32) - FloorDiv(k, 32)
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, sympy.Or(distance < 1, IsPowerOfTwo(distance)))))


@case
def power_32_few_sinks(sizes, device):
    """Sinks and near band end within a block: tiles of listed blocks are cut."""
    distance = FloorDiv(q, 32) - FloorDiv(k, 32)
    keep = sympy.Or(q - k < 11, IsPowerOfTwo(distance), k < 7)
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, keep)))


@case
def power_at_an_offset(sizes, device):
    shift = scalar("past")
    position = q + shift
    plan = Plan(
        "power",
        AttentionSpec(sizes.scale * s, sympy.Le(k, position), power_keep(16, 16, 3, position), scalars=("past",)),
    )
    return Call(plan, scalars=[sizes.k_len - sizes.q_len])


@case
def power_at_a_known_offset(sizes, device):
    position = q + 3
    return Call(Plan("power", AttentionSpec(sizes.scale * s, sympy.Le(k, position), power_keep(16, 16, 3, position))))


@case
def power_by_pointer(sizes, device):
    position = q + load("start", [], integer=True)
    plan = Plan("power", AttentionSpec(sizes.scale * s, sympy.Le(k, position), power_keep(16, 16, 16, position)))
    plan = replace(plan, spec=replace(plan.spec, captures=(CaptureSpec("start", "int64", 0),)))
    return Call(plan, captures=[torch.tensor(max(0, sizes.k_len - sizes.q_len - 5), device=device)])


@case
def power_two_sided(sizes, device):
    """No causality: blocks behind by the list, a near band that ends, and listed blocks on both sides of it."""
    distance = FloorDiv(q, 16) - FloorDiv(k, 16)
    keep = sympy.Or(sympy.And(distance >= 2, distance < 4), IsPowerOfTwo(distance), k < 3)
    return Call(Plan("power", AttentionSpec(sizes.scale * s, sympy.true, keep)))


@case
def power_of_odd_blocks(sizes, device):
    """Blocks that no tile divides: everything in the band is visited and tested."""
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, power_keep(12, 12, 2))))


@case
def list_alone(sizes, device):
    distance = FloorDiv(q, 16) - FloorDiv(k, 16)
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, sympy.Or(IsPowerOfTwo(distance), k < 4))))
