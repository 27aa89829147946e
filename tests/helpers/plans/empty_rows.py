"""Queries without keys, and what user code gives them."""

from __future__ import annotations

import sympy
import torch

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import Table, Where, b, h, k, load, q, s
from effattn.ir.plan import Plan
from plans.calls import CAUSAL, Call, case, padding_of, random


@case
def fills_in_the_score(sizes, device):
    """Two masks that replace or take up the score; where both hide a key there is -inf."""
    lowest, seen = torch.finfo(torch.float32).min, sympy.Ne(load("padding", [b, k], integer=True), 0)
    score = Where(CAUSAL, sizes.scale * s, lowest) + Where(seen, 0, lowest)
    plan = Plan("exact", AttentionSpec(score, empty_rows="nan", captures=(CaptureSpec("padding", "bool", 2),)))
    return Call(plan, captures=[padding_of(sizes, device, left=True)])


@case
def empty_rows_zero(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, k >= 20), empty_rows="zero")))


@case
def empty_rows_nan(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, k >= 20), empty_rows="nan")))


@case
def empty_rows_mean(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, k >= 20), empty_rows="mean")))


@case
def empty_rows_uniform(sizes, device):
    """A mask of large numbers that are added: they leave rows without keys equal scores, and their gradients."""
    seen = sympy.And(CAUSAL, sympy.Ne(load("padding", [b, k], integer=True), 0))
    score = Table(h, -0.5, 0.6, 0.2) * s + 0.1 * k
    plan = Plan(
        "exact", AttentionSpec(score, seen, empty_rows="uniform", captures=(CaptureSpec("padding", "bool", 2),))
    )
    return Call(plan, captures=[padding_of(sizes, device, left=True)])


@case
def empty_rows_uniform_and_learned(sizes, device):
    """The same with another slope for each pair, and a bias that needs a gradient."""
    seen = sympy.And(CAUSAL, sympy.Ne(load("padding", [b, k], integer=True), 0))
    score = 3 * sympy.tanh(sizes.scale * s + load("bias", [0 * b, h, q, k], integer=False))
    captures = (CaptureSpec("padding", "bool", 2), CaptureSpec("bias", "float32", 4))
    plan = Plan("exact", AttentionSpec(score, seen, empty_rows="uniform", captures=captures))
    bias = random((1, sizes.heads, sizes.q_len, sizes.k_len), device)
    return Call(plan, captures=[padding_of(sizes, device, left=True), bias])
