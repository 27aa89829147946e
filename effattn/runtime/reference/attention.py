"""The definition of a plan over the full N x N matrix: the ground truth for every target.

For tests and small inputs only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effattn.errors import PlanError
from effattn.ir.attention import DROPOUT_SEED
from effattn.ir.plan import Plan
from effattn.lowering.device import HOST
from effattn.runtime import philox
from effattn.runtime.algebra import bindings, evaluate


def dense_mask(
    plan: Plan,
    shape: tuple[int, int, int, int],
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
    device: torch.device | str = HOST,
) -> Tensor:
    """Which keys each query keeps: bool of ``shape`` (B, Hq, Nq, Nk).

    Raises:
        PlanError: the plan has a selector, which depends on query and key.
    """
    if plan.sparsity.select is not None:
        raise PlanError("what a selector keeps depends on query and key: the form's own reference defines it")
    symbols, tensors = bindings(plan.spec, captures, scalars, numbers)
    symbols |= _indices(shape, device)
    mask = evaluate(plan.spec.rule, symbols, tensors, torch.float64, device)
    return torch.as_tensor(mask, device=device).to(torch.bool).expand(shape)


def reference(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a plan, both in ``dtype``; differentiable, also in captured tensors.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D], Hq a multiple of Hkv.
        value: [B, Hkv, Nk, Dv].
        captures, scalars, numbers: in the plan's order.
        dtype: dtype of the computation.

    Returns:
        out [B, Hq, Nq, Dv] and lse [B, Hq, Nq]. A query without keys has lse -inf and the output given by
        ``plan.spec.empty_rows``.
    """
    batch, heads, q_len, _ = query.shape
    groups = heads // key.shape[1]
    shape = (batch, heads, q_len, key.shape[2])
    key, value = (tensor.to(dtype).repeat_interleave(groups, dim=1) for tensor in (key, value))
    symbols, tensors = bindings(plan.spec, captures, scalars, numbers)
    symbols |= _indices(shape, query.device)
    symbols["s"] = query.to(dtype) @ key.transpose(-1, -2)

    mask = dense_mask(plan, shape, captures, scalars, numbers, query.device)
    score = evaluate(plan.spec.score, symbols, tensors, dtype, query.device)
    score = torch.as_tensor(score, dtype=dtype, device=query.device).expand(shape)
    equal = score - score.detach()  # what a large number that is added leaves of scores: nothing but their gradients
    score = torch.where(mask, score, -torch.inf)

    # the softmax of a row without keys is replaced by that of zeros, which keeps NaN out of the gradient
    empty = (score == -torch.inf).all(dim=-1, keepdim=True)
    weights = torch.where(empty, 0.0, score).softmax(dim=-1)
    if plan.spec.empty_rows == "nan":
        weights = torch.where(empty, torch.nan, weights)
    lse = torch.where(empty, 0.0, score).logsumexp(dim=-1)
    drop = _dropout(plan, shape, tensors)
    out = drop(weights) @ value
    out = torch.where(empty, _empty_output(plan, value, equal, out, drop), out)
    return out, torch.where(empty[..., 0], -torch.inf, lse)


def _dropout(plan: Plan, shape: tuple[int, int, int, int], captures: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """What happens to weights after the softmax."""
    spec, (batch, heads, q_len, k_len) = plan.spec, shape
    if not spec.dropout:
        return lambda weights: weights
    seed = captures[DROPOUT_SEED]
    pairs = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1, 1)
    kept = philox.kept(seed, spec.least_kept, pairs, (0, q_len), [(0, k_len)])
    return lambda weights: weights * kept * spec.kept_scale


def _empty_output(plan: Plan, value: Tensor, equal: Tensor, out: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
    match plan.spec.empty_rows:
        case "uniform":
            return drop(equal.softmax(dim=-1)) @ value
        case "mean":
            return drop(torch.full_like(equal, 1 / equal.shape[-1])) @ value
        case "nan":
            return out
        case _:
            return torch.zeros((), dtype=value.dtype, device=value.device)


def _indices(shape: tuple[int, int, int, int], device: torch.device | str) -> dict[str, Tensor | int]:
    named = {}
    for dim, (name, size) in enumerate(zip("bhqk", shape, strict=True)):
        view = [1] * 4
        view[dim] = size
        named[name] = torch.arange(size, device=device).view(view)
    return {**named, "Nq": shape[2], "Nk": shape[3]}
