"""Gradients of queries without keys, which no loop over the keys that a mask allows visits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.derivative import affine_slope, reads_of
from effattn.ir.plan import Plan
from effattn.lowering.device import on_host
from effattn.runtime.algebra import bindings, evaluate
from effattn.runtime.targets.target import Gradients


def have_gradients(spec: AttentionSpec) -> bool:
    """Whether queries without keys give anything to gradients."""
    return spec.empty_rows == "nan" or spec.empty_output == "mean"


def add_empty_rows(
    plan: Plan,
    grads: Gradients,
    run_backward: Callable[..., Gradients],
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    data: tuple[Sequence[Tensor], Sequence[int], Sequence[float]],
    wanted: Sequence[str] = (),
) -> None:
    """Add what queries without keys give to gradients, in place.

    Args:
        grads: of query [B, Hq, Nq, D], where they are zero for such queries, key and value [B, Hkv, Nk, ...], and of
            the captured tensors in ``wanted``.
        run_backward: the target's own. It runs for such queries alone where their scores have a gradient for which
            there is no closed form.
        given: grad_out, query, key, value, out and lse.
        data: captured tensors, scalars and numbers, in the plan's order.
    """
    spec, (of_query, of_key, of_value, of_captures) = plan.spec, grads
    grad_out, query, key, value, out, lse = given
    if not have_gradients(spec):
        return
    heads = (key.shape[1], query.shape[1] // key.shape[1])
    empty = lse == -torch.inf
    if spec.empty_rows == "nan":
        # weights of NaN reach every value; a mask that replaces scores keeps them from query and key
        of_value += torch.where(empty.unflatten(1, heads).any(dim=3).any(dim=2), torch.nan, 0.0)[..., None, None]
    if spec.empty_output != "mean" or (on_host(empty) and not empty.any()):
        return
    if spec.dropout or (spec.empty_rows == "uniform" and not _closed(spec, wanted)):
        captures, *rest = data
        lse = torch.where(empty, expr.LOWEST, -torch.inf)
        wanted = wanted if spec.empty_rows == "uniform" else ()
        more = run_backward(
            plan.of_empty_rows, grad_out, None, query, key, value, out, lse, [*captures, empty], *rest, wanted
        )
        if spec.empty_rows == "mean":
            of_value += more[2]
            return
        for total, part in zip((*grads[:3], *of_captures), (*more[:3], *more[3]), strict=True):
            total += part
        return
    lost = torch.where(empty[..., None], grad_out.to(torch.promote_types(grad_out.dtype, torch.float32)), 0.0)
    of_value += lost.unflatten(1, heads).sum(dim=(2, 3))[:, :, None] / key.shape[2]
    if spec.empty_rows != "uniform":
        return
    # d score[k] = grad_out . (value[k] - mean) / Nk: sums over keys and queries are matrices of Dv x D
    lost = (lost * _slope(spec, data, query, key)).unflatten(1, heads)
    apart = value.to(lost.dtype) - value.mean(dim=2, keepdim=True, dtype=lost.dtype)
    by_key = apart.transpose(-1, -2) @ key.to(lost.dtype) / key.shape[2]
    of_query += (lost @ by_key[:, :, None]).flatten(1, 2)
    by_query = lost.flatten(2, 3).transpose(-1, -2) @ query.unflatten(1, heads).flatten(2, 3).to(lost.dtype)
    of_key += apart @ by_query / key.shape[2]


def _closed(spec: AttentionSpec, wanted: Sequence[str]) -> bool:
    """Whether the scores have one slope for each head, and read no tensor that needs a gradient."""
    return affine_slope(spec.score) is not None and not any(reads_of(spec.score, name) for name in wanted)


def _slope(spec: AttentionSpec, data: Any, query: Tensor, key: Tensor) -> Tensor | float:
    """The factor of the raw score, a number or [B or 1, Hq or 1, 1, 1]."""
    symbols, captures = bindings(spec, *data)
    for place, name in enumerate("bh"):
        size = [1, 1, 1, 1]
        size[place] = query.shape[place]
        symbols[name] = torch.arange(query.shape[place], device=query.device).view(size)
    symbols |= {"Nq": query.shape[2], "Nk": key.shape[2]}
    slope = affine_slope(spec.score)
    assert slope is not None
    return evaluate(slope, symbols, captures, torch.promote_types(query.dtype, torch.float32), query.device)
