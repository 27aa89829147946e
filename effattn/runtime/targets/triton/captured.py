"""Buffers that kernels fill with the gradients of captured tensors, and the sums of these.

See :mod:`effattn.lowering.kernels.score_facts` for what is summed up where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effattn.ir.attention import AttentionSpec
from effattn.lowering.kernels.score_facts import CapturedTerm, may_own
from effattn.lowering.kernels.spec import WantedGradient
from effattn.runtime.algebra import bindings, evaluate
from effattn.runtime.targets.captured import add_at

BITS = 62  # of an int64 that sums may use; a sign, and one bit for what rounding adds
EXPONENTS = (-120.0, 120.0)  # of a unit, so that it and its inverse are normal float32 numbers


def wanted_gradients(
    spec: AttentionSpec, wanted: Sequence[str], captures: Sequence[Tensor], shape: tuple[int, int, int, int]
) -> tuple[WantedGradient, ...]:
    """How the captured tensors in ``wanted`` are reduced in a call; ``shape`` is (B, Hq, Nq, Nk)."""
    by_name = dict(zip((load.name for load in spec.captures), captures, strict=True))

    def owned(name: str) -> bool:
        held = [size for size in by_name[name].shape if size > 1]
        return may_own(spec.score, name) and sorted(held) == sorted(size for size in shape if size > 1)

    return tuple(WantedGradient(name, owned(name)) for name in wanted)


def buffers(
    terms: Sequence[CapturedTerm], captures: dict[str, Tensor], shape: tuple[int, int, int, int], tile: int = 0
) -> list[Tensor]:
    """What kernels fill: a number for each query or key of each head, or the elements themselves, which begin at 0.

    Or two rows of ``tile`` distances for each diagonal of square tiles.
    """
    batch, heads, q_len, k_len = shape
    found = []
    for term in terms:
        like, dtype = captures[term.name], getattr(torch, term.type)
        if term.reduced == "pairs":
            found.append(torch.zeros(like.shape, dtype=dtype, device=like.device))
        elif term.reduced == "distances":
            diagonals = -(-q_len // tile) - (-k_len // tile) - 1
            found.append(like.new_empty((batch, heads, diagonals, 2, tile), dtype=dtype))
        else:
            found.append(like.new_empty((batch, heads, q_len if term.reduced == "rows" else k_len), dtype=dtype))
    return found


def inverse_unit(
    value: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None, kept_scale: float = 1.0
) -> Tensor:
    """A power of two, float32 [1]: times this, no sum of gradients of scores exceeds an int64. NaN if one may be NaN.

    The weights of a query sum to one, so its gradients are at most twice the largest product of a gradient and a value,
    times what dropout multiplies weights by.
    """
    norms = (torch.linalg.vector_norm(each, dim=-1, dtype=torch.float32).amax() for each in (grad_out, value))
    most = 2 * kept_scale * math.prod(norms)
    if grad_lse is not None:
        most = most + grad_lse.abs().amax()
    every = most.double() * lse.numel()
    exponent = (BITS - every.log2().ceil()).clamp(*EXPONENTS)
    exponent = torch.where(lse.isnan().any() | every.isinf(), torch.nan, exponent)
    return exponent.exp2().float().reshape(1)


def gradients(
    spec: AttentionSpec,
    terms: Sequence[CapturedTerm],
    filled: Sequence[Tensor],
    unit: Tensor | None,
    wanted: Sequence[str],
    given: tuple[Sequence[Tensor], Sequence[int], Sequence[float]],
    shape: tuple[int, int, int, int],
) -> list[Tensor]:
    """The gradients of the tensors in ``wanted``, from the buffers that kernels have filled."""
    if not wanted:
        return []
    symbols, captures = bindings(spec, *given)
    found: dict[str, Tensor] = {}
    for term, buffer in zip(terms, filled, strict=True):
        like = captures[term.name]
        if term.reduced == "pairs":
            total = buffer if unit is None or not term.whole else buffer.double() / unit
        else:
            buffer, first = _by_distance(buffer, shape[3]) if term.reduced == "distances" else (buffer, 0)
            total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
            add_at(total, _indices(term, buffer, first, {**symbols, "Nq": shape[2], "Nk": shape[3]}, captures), buffer)
        total = total if term.factor == 1 else total * term.factor
        found[term.name] = found[term.name] + total if term.name in found else total
    zeros = (torch.zeros_like(captures[name], memory_format=torch.contiguous_format) for name in wanted)
    return [
        found[name].to(captures[name].dtype) if name in found else zero
        for name, zero in zip(wanted, zeros, strict=True)
    ]


def _by_distance(diagonals: Tensor, k_len: int) -> tuple[Tensor, int]:
    """The sums for all distances of queries and keys, [B, Hq, distances], and the first of them.

    Two diagonals of tiles have a part of each. ``diagonals``: [B, Hq, diagonals, 2, tile].
    """
    tile = diagonals.shape[4]
    found = torch.nn.functional.pad(diagonals[:, :, :, 0], (0, 0, 0, 1))
    found[:, :, 1:] += diagonals[:, :, :, 1]
    return found.flatten(2), 1 - -(-k_len // tile) * tile


def _indices(
    term: CapturedTerm, buffer: Tensor, first: int, symbols: dict[str, Any], captures: dict[str, Tensor]
) -> list[Any]:
    """The indices of a load for each query, key or distance from ``first`` on of each head, [B, Hq, N]."""
    symbols["k"] = 0  # a distance is that of a query and the first key
    for dim, name in enumerate(("b", "h", "k" if term.reduced == "keys" else "q")):
        size = [1, 1, 1]
        size[dim] = buffer.shape[dim]
        symbols[name] = torch.arange(buffer.shape[dim], device=buffer.device).view(size) + (first if dim == 2 else 0)
    return [evaluate(index, symbols, captures, torch.float32, buffer.device) for index in term.read.load.indices]
