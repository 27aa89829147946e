"""Linear attention on any device, in ATen, chunk by chunk: nothing is N x N, and states are float32.

As in Lightning-2 (arXiv 2405.17381, algorithm 1): the N x N definition inside a chunk, the state between chunks. Decay
appears only as a power within one chunk, which cannot overflow since decay is at most 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 128  # tokens
ELEMENTS = 2**24  # most elements of the intermediate values of one piece


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    out: Tensor,
    *,
    scale: float,
    causal: bool,
    ones: bool = False,
    eps: float = 0.0,
    reverse: bool = False,
) -> Tensor:
    """Fill ``out`` and return the state after the last token.

    Args:
        query: [B, H or H / G, N, F]; key: [B, H or H / G, Nk, F]; value: [B, as key, Nk, Dv], any strides. Either side
        may have fewer heads, which groups then share. Nk = N if causal.
        log_decay: [H] float32; state: [B, H, F, Dv (+ 1 with ``ones``)], the state before the first token.
        out: [B, H, N, Dv], any floating-point dtype.
        ones: value gets a column of ones, and the output is divided by its result plus ``eps``.
        reverse: time runs from the last token to the first.

    Returns:
        [B, H, F, Dv (+ 1)] float32, float64 for float64 inputs; shares no memory with ``state``.
    """
    heads, dtype = max(query.shape[1], key.shape[1]), state_dtype(query)
    features, width = query.shape[3], value.shape[3] + ones
    memory = torch.zeros((query.shape[0], heads, features, width), dtype=dtype, device=query.device)
    if state is not None:
        memory.copy_(state)
    if not causal:
        return _both_directions(query, key, value, memory, out, scale, ones, eps)
    rates = None if log_decay is None else log_decay.to(dtype)
    per_chunk = query.shape[0] * heads * (CHUNK * (CHUNK + 2 * features + 2 * width) + features * width)
    for start, count, size in _pieces(query.shape[2], max(1, ELEMENTS // max(1, per_chunk))):
        stop = start + count * size
        part = slice(query.shape[2] - stop, query.shape[2] - start) if reverse else slice(start, stop)
        q, k, v = (_chunks(tensor[:, :, part], heads, count, reverse, dtype) for tensor in (query, key, value))
        v = _with_ones(v) if ones else v
        found, memory = _piece(q, k, v, rates, memory)
        found = _finished(found.flatten(2, 3), scale, ones, eps)
        out[:, :, part] = found.flip(2) if reverse else found
    return memory


run_step = run  # a few tokens are one chunk


def why_not(dtype: Any, features: int, value_dim: int) -> None:
    """It supports every call."""


def describe(site: Any, causal: bool, decay: bool, normalised: bool) -> str:
    return "portable (ATen, in chunks)"


def _pieces(length: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(first token, chunks, tokens per chunk): whole chunks, as many at a time as fit, then the short one at the
    end."""
    whole = length // CHUNK
    for first in range(0, whole, most):
        yield first * CHUNK, min(most, whole - first), CHUNK
    if rest := length - whole * CHUNK:
        yield whole * CHUNK, 1, rest


def _piece(q: Tensor, k: Tensor, v: Tensor, rates: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Some chunks of one size: q, k [B, H, chunks, C, F], v [B, H, chunks, C, Dv] to (output like v, next state)."""
    size = q.shape[3]
    weights = q @ k.mT
    if rates is None:
        weights = weights.tril()
        sums = k.mT @ v
    else:
        place = torch.arange(size, device=q.device)
        distance = place[:, None] - place
        rate = rates[:, None, None, None]
        weights = weights * torch.where(distance >= 0, torch.exp(rate * distance.clamp(min=0)), 0.0)
        sums = (k * torch.exp(rate * (size - 1 - place)[:, None])).mT @ v
    before = torch.empty_like(sums)
    whole = None if rates is None else torch.exp(rates * size)[:, None, None]
    for chunk in range(q.shape[2]):
        before[:, :, chunk] = memory
        memory = sums[:, :, chunk] + (memory if whole is None else whole * memory)
    old = q @ before
    if rates is not None:
        old = old * torch.exp(rate * (place + 1)[:, None])
    return weights @ v + old, memory


def _both_directions(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor, out: Tensor, scale: float, ones: bool, eps: float
) -> Tensor:
    """One state for all queries: the sum over all keys."""
    heads, dtype = memory.shape[1], memory.dtype
    step = max(1, ELEMENTS // max(1, memory.shape[0] * heads * sum(memory.shape[2:])))
    for start in range(0, key.shape[2], step):
        k, v = (_chunks(tensor[:, :, start : start + step], heads, 1, False, dtype)[:, :, 0] for tensor in (key, value))
        memory = memory + k.mT @ (_with_ones(v) if ones else v)
    for start in range(0, query.shape[2], step):
        q = _chunks(query[:, :, start : start + step], heads, 1, False, dtype)[:, :, 0]
        out[:, :, start : start + step] = _finished(q @ memory, scale, ones, eps)
    return memory


def _chunks(tensor: Tensor, heads: int, count: int, reverse: bool, dtype: torch.dtype) -> Tensor:
    """[B, H or H / G, n, D] to [B, H, count, n / count, D], a copy."""
    tensor = tensor.flip(2) if reverse else tensor
    tensor = tensor.to(dtype).repeat_interleave(heads // tensor.shape[1], dim=1)
    return tensor.unflatten(2, (count, tensor.shape[2] // count))


def _with_ones(value: Tensor) -> Tensor:
    return torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)


def _finished(found: Tensor, scale: float, ones: bool, eps: float) -> Tensor:
    found = found * scale
    return found[..., :-1] / (found[..., -1:] + eps) if ones else found


def state_dtype(query: Tensor) -> torch.dtype:
    """States are float32 whatever the inputs: in bfloat16 a sum of ones stops growing at 256."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
