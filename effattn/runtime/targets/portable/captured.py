"""Gradients of captured tensors, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effattn.ir.derivative import Reads, reads_of
from effattn.ir.expr import b, h, k, q
from effattn.runtime.targets.captured import add_at
from effattn.runtime.targets.portable.call import Call, Piece

_SCORES = (b, h, q, k)  # the dimensions of the scores


class Captured:
    """The gradients of the captured tensors in ``wanted``, which begin as zeros."""

    def __init__(self, call: Call, wanted: Sequence[str]):
        self.call, self.wanted = call, wanted
        self.totals = {
            name: torch.zeros(call.captures[name].shape, dtype=call.dtype, device=call.device) for name in wanted
        }
        score = call.plan.spec.score
        self.reads = [(name, read) for name in wanted for read in reads_of(score, name)]

    def add(self, piece: Piece, of_score: Tensor, weights: Tensor, symbols: dict[str, Any]) -> None:
        """Add what a piece gives. ``of_score``, the gradient of its scores, and weights: [b, hkv, G, rows, n]."""
        for name, read in self.reads:
            slope = self.call.evaluate(read.slope, symbols)
            # the slope at a masked score may be anything, even infinite
            values = torch.where(weights == 0, 0.0, of_score * slope)
            total = self.totals[name]
            if _is_plain(read, total):
                self._add_slices(total, read, piece, values)
            else:
                add_at(total, [self.call.evaluate(index, symbols) for index in read.load.indices], values)

    def results(self) -> list[Tensor]:
        return [self.totals[name].to(self.call.captures[name].dtype) for name in self.wanted]

    def _add_slices(self, total: Tensor, read: Reads, piece: Piece, values: Tensor) -> None:
        """Where each index is an index of the scores: without a place for each element."""
        axes = {index: dim for dim, index in enumerate(read.load.indices) if total.shape[dim] > 1}
        order = [axes[index] for index in _SCORES if index in axes]
        rest = [dim for dim in range(total.ndim) if dim not in order]  # of size 1
        view = total.permute([*order, *rest]).reshape([total.shape[dim] for dim in order])
        shared = [place for place, index in enumerate(_SCORES) if index not in axes]
        for place in shared:
            view = view.unsqueeze(place)
        heads = slice(piece.kv_heads.start * self.call.groups, piece.kv_heads.stop * self.call.groups)
        parts: dict[Any, slice] = {b: piece.batches, h: heads, q: slice(piece.chunk.start, piece.chunk.stop)}
        for dim, index in enumerate(_SCORES[:3]):
            if index in axes:
                part = parts[index]
                view = view.narrow(dim, part.start, part.stop - part.start)
        values = values.flatten(1, 2)
        values = values.sum(shared, keepdim=True) if shared else values
        if k not in axes:
            view += values
            return
        column = 0
        for start, stop in piece.chunk.slices():
            view[..., start:stop] += values[..., column : column + stop - start]
            column += stop - start


def _is_plain(read: Reads, total: Tensor) -> bool:
    used = [index for dim, index in enumerate(read.load.indices) if total.shape[dim] > 1]
    return all(index in _SCORES for index in used) and len(set(used)) == len(used)
