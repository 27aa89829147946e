"""Scores: scales, biases and anything else between the product and the softmax."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import BitAnd, BitOr, BitXor, FloorDiv, Group, Modulo, Table, Where, b, h, k, load, number, q, s
from effattn.ir.plan import Plan
from plans.calls import CAUSAL, Call, case, random


@case
def soft_cap(sizes, device):
    return Call(Plan("exact", AttentionSpec(5.0 * sympy.tanh(sizes.scale * s / 5.0), CAUSAL)))


@case
def decay_of_times(sizes, device):
    """Times so large that the score has no digits left beside one of them, and their difference is small."""
    times = load("times", [q], integer=False) - load("times", [k], integer=False)
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s - 0.1 * Group(times), CAUSAL, captures=(CaptureSpec("times", "float32", 1),)),
    )
    return Call(plan, [1e7 + torch.arange(max(sizes.q_len, sizes.k_len), device=device).float()])


@case
def alibi(sizes, device):
    slopes = load("slopes", [h], integer=False)
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s + slopes * (k - q), CAUSAL, captures=(CaptureSpec("slopes", "float32", 1),)),
    )
    return Call(plan, captures=[2.0 ** -torch.arange(1, sizes.heads + 1, device=device)])


@case
def constant_slopes(sizes, device):
    """ALiBi, its slopes known when compiling; a number for each distance, up to eight."""
    near = Table(q - k, *(sympy.Float(0.3 * i) for i in range(9)))
    return Call(Plan("exact", AttentionSpec(sizes.scale * s + Table(h, 0.5, 0.25) * (k - q) + near, CAUSAL)))


@case
def bias(sizes, device):
    added = load("bias", [0 * b, h, q, k], integer=False)
    plan = Plan("exact", AttentionSpec(sizes.scale * s + added, captures=(CaptureSpec("bias", "float32", 4),)))
    return Call(plan, captures=[random((1, sizes.heads, sizes.q_len, sizes.k_len), device)])


@case
def bias_by_distance(sizes, device):
    """A table of relative positions, clamped: indices that are computed."""
    place = sympy.Max(0, sympy.Min(31, q - k + 16))
    plan = Plan("exact", AttentionSpec(sizes.scale * s + load("table", [h, place], integer=False)))
    plan = replace(plan, spec=replace(plan.spec, captures=(CaptureSpec("table", "float32", 2),)))
    return Call(plan, captures=[random((sizes.heads, 32), device)])


@case
def decomposed_positions(sizes, device):
    """A bias from the rows and columns of a picture, as in SAM; heads in two digits."""
    place = [b, Modulo(h, 2), FloorDiv(q, 8), Modulo(q, 8)]
    rows, columns = (load(name, [*place, at(k, 8)], integer=False) for name, at in (("y", FloorDiv), ("x", Modulo)))
    captures = (CaptureSpec("y", "float32", 5), CaptureSpec("x", "float32", 5))
    plan = Plan("exact", AttentionSpec(sizes.scale * s + Group(rows + columns), captures=captures))
    shape = (sizes.batch, 2, sizes.q_len // 8 + 1, 8)
    return Call(plan, captures=[random((*shape, sizes.k_len // 8 + 1), device), random((*shape, 8), device, 4)])


@case
def minus_infinity_bias(sizes, device):
    added = load("bias", [b, h, q, k], integer=False)
    plan = Plan("exact", AttentionSpec(sizes.scale * s + added, captures=(CaptureSpec("bias", "float32", 4),)))
    mask = torch.ones(sizes.q_len, sizes.k_len).tril()[None, None].to(device)
    return Call(plan, captures=[torch.where(mask > 0, 0.0, float("-inf"))])


@case
def smallest_number_bias(sizes, device):
    added = load("bias", [b, h, q, k], integer=False)
    plan = Plan("exact", AttentionSpec(sizes.scale * s + added, captures=(CaptureSpec("bias", "float32", 4),)))
    mask = torch.ones(sizes.q_len, sizes.k_len).tril(-1)[None, None].to(device)
    return Call(plan, captures=[torch.where(mask > 0, 0.0, torch.finfo(torch.float32).min)])


@case
def scale_at_run_time(sizes, device):
    plan = Plan("exact", AttentionSpec(number("scale") * s, CAUSAL, numbers=("scale",)))
    return Call(plan, numbers=[sizes.scale])


@case
def negative_scale(sizes, device):
    return Call(Plan("exact", AttentionSpec(-sizes.scale * s, CAUSAL)))


@case
def negative_scale_at_run_time(sizes, device):
    return Call(Plan("exact", AttentionSpec(number("scale") * s, CAUSAL, numbers=("scale",))), numbers=[-0.3])


@case
def zero_scale_at_run_time(sizes, device):
    return Call(Plan("exact", AttentionSpec(number("scale") * s, CAUSAL, numbers=("scale",))), numbers=[0.0])


@case
def scale_per_head(sizes, device):
    plan = Plan(
        "exact",
        AttentionSpec(load("scales", [h], integer=False) * s, CAUSAL, captures=(CaptureSpec("scales", "float32", 1),)),
    )
    return Call(plan, captures=[torch.linspace(-0.5, 0.6, sizes.heads, device=device)])


@case
def many_operations(sizes, device):
    odd = sympy.Or(sympy.Eq(Modulo(q - k, 3), 0), sympy.Not(sympy.Eq(Modulo(k - 40, 7), 2)))
    score = sizes.scale * s * Where(k > q, 0.5, 1.0) + 0.1 * sympy.Abs(FloorDiv(q - k, 5)) - sympy.exp(-0.01 * k)
    return Call(Plan("exact", AttentionSpec(score, odd)))


@case
def waves(sizes, device):
    return Call(
        Plan("exact", AttentionSpec(sizes.scale * s + sympy.sin(Group(0.3 * q - 0.3 * k)) * sympy.cos(0.1 * k)))
    )


@case
def powers_and_bits(sizes, device):
    score = sizes.scale * s * sympy.Pow(0.99, Group(q - k)) - sympy.Pow(2, -1 - h) * sympy.log(1 + q - k)
    seen = sympy.And(CAUSAL, sympy.Or(BitAnd(BitXor(q, k), 21) < 17, BitOr(q - k, -4) < -2))
    return Call(Plan("exact", AttentionSpec(score, seen)))
