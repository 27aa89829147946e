"""Masks: which keys a query may attend to."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import FloorDiv, Nk, Nq, b, h, k, load, q, s
from effattn.ir.plan import Plan
from plans.calls import CAUSAL, Call, case, padding_of, random


@case
def none(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s)))


@case
def causal(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, CAUSAL, empty_rows="never")))


@case
def causal_from_the_end(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.Le(k, q + Nk - Nq))))


@case
def two_sided_window(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(k - q < 9, q - k < 20))))


@case
def chunked(sizes, device):
    return Call(
        Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, sympy.Ge(FloorDiv(k, 24), FloorDiv(q, 24)))))
    )


@case
def right_padding(sizes, device):
    padding = sympy.Ne(load("padding", [b, k], integer=True), 0)
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, padding), captures=(CaptureSpec("padding", "bool", 2),)),
    )
    return Call(plan, captures=[padding_of(sizes, device, left=False)])


@case
def left_padding(sizes, device):
    padding = sympy.Ne(load("padding", [b, k], integer=True), 0)
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, padding), captures=(CaptureSpec("padding", "bool", 2),)),
    )
    return Call(plan, captures=[padding_of(sizes, device, left=True)])


@case
def lengths_per_batch(sizes, device):
    plan = Plan("exact", AttentionSpec(sizes.scale * s, k < load("lengths", [b], integer=True)))
    plan = replace(plan, spec=replace(plan.spec, captures=(CaptureSpec("lengths", "int32", 1),)))
    lengths = torch.tensor([max(0, sizes.k_len - 11 * i) for i in range(sizes.batch)], dtype=torch.int32)
    return Call(plan, captures=[lengths.to(device)])


@case
def documents(sizes, device):
    same = sympy.Eq(load("document", [b, q], integer=True), load("document", [b, k], integer=True))
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, same), captures=(CaptureSpec("document", "int64", 2),)),
    )
    ids = torch.arange(max(sizes.q_len, sizes.k_len)).div(19, rounding_mode="floor").expand(sizes.batch, -1)
    return Call(plan, captures=[ids.to(device)])


@case
def blocks_in_a_table(sizes, device):
    """One boolean for each pair of blocks, as FlexAttention's block masks list them."""
    listed = sympy.Ne(load("blocks", [b, 0, FloorDiv(q, 32), FloorDiv(k, 32)], integer=True), 0)
    plan = Plan(
        "exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, listed), captures=(CaptureSpec("blocks", "bool", 4),))
    )
    table = random((sizes.batch, 1, -(-sizes.q_len // 32), -(-sizes.k_len // 32)), device) > 0
    return Call(plan, captures=[table])


@case
def cache_by_pointer(sizes, device):
    """A static cache: keys up to a position that only the device knows."""
    live = load("live", [], integer=True)
    plan = Plan(
        "exact", AttentionSpec(sizes.scale * s, sympy.Le(k, q + live), captures=(CaptureSpec("live", "int64", 0),))
    )
    return Call(plan, captures=[torch.tensor(max(0, sizes.k_len // 3), device=device)])


@case
def opaque_mask(sizes, device):
    seen = sympy.Ne(load("mask", [b, h, q, k], integer=True), 0)
    plan = Plan("exact", AttentionSpec(sizes.scale * s, seen, captures=(CaptureSpec("mask", "bool", 4),)))
    mask = random((sizes.batch, 1, sizes.q_len, sizes.k_len), device) > 0
    mask[:, :, sizes.q_len // 2] = False
    return Call(plan, captures=[mask])


@case
def nothing_at_all(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, k < 0 * q - 3, empty_rows="zero")))
