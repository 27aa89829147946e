"""One call of a plan in pieces that fit in memory: chunks of queries, the keys they visit, scores and masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.ir.attention import DROPOUT_SEED, AttentionSpec
from effattn.ir.plan import Plan
from effattn.lowering.device import on_host
from effattn.runtime import philox
from effattn.runtime.algebra import Span, bindings, evaluate, plain
from effattn.runtime.targets.chunks import Chunk, Walker, tile_ranges_of
from effattn.runtime.targets.sdpa import scale_and_bias

SCORES = 2**24  # most elements of the blocks of scores in memory at a time: 64 MiB in float32
ROWS = 128
OF_DROPOUT = 5  # live blocks of random words, of 64 bits each


@dataclass(frozen=True)
class Piece:
    """A part of one call that is computed at a time: some batches, some kv heads, one chunk of queries."""

    batches: slice
    kv_heads: slice
    chunk: Chunk


class Call:
    """One call of a plan: tensors viewed with grouped heads, values of names, and pieces."""

    def __init__(
        self,
        plan: Plan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor],
        scalars: Sequence[int],
        numbers: Sequence[float],
        live_blocks: int = 1,
    ):
        self.plan, self.budget = plan, SCORES // live_blocks
        self.batch, self.heads, self.q_len, self.head_dim = query.shape
        self.kv_heads, self.k_len, self.value_dim = key.shape[1], key.shape[2], value.shape[3]
        self.groups = self.heads // self.kv_heads
        self.device = query.device
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.query = self.by_group(query)
        self.key, self.value = key, value
        self.names, self.captures = bindings(plan.spec, captures, scalars, numbers)
        self.tile_ranges = tile_ranges_of(plan.spec.rule)
        self.walker = Walker(
            plan.spec.rule, (self.batch, self.heads, self.q_len, self.k_len), self.names, self.captures, self.dtype
        )
        # the score as scale * s + bias; scale is None if it is another function
        factor, self.bias = scale_and_bias(plan.spec.score)
        lengths = {"Nq": self.q_len, "Nk": self.k_len}
        self.scale = None if factor is None else float(self.evaluate(factor, {**self.names, **lengths}))
        self.only_scale = self.scale if self.bias == 0 else None  # c if the score is c * s

    def takes_flash_kernel(self) -> bool:
        """Whether PyTorch's CPU flash kernel computes this: scale * s plus a mask, equal head dimensions, no
        dropout."""
        plain = self.scale is not None and not self.plan.spec.dropout
        return on_host(self.query) and plain and self.head_dim == self.value_dim

    def by_group(self, tensor: Tensor) -> Tensor:
        """[B, Hq, Nq, ...] viewed as [B, Hkv, G, Nq, ...]."""
        return tensor.unflatten(1, (self.kv_heads, self.groups))

    def pieces(self) -> Iterator[Piece]:
        """The call in pieces whose scores fit the budget."""
        if self.batch * self.heads * self.q_len == 0:
            return
        for chunk in self.walker.chunks(self._rows()):
            per_head = max(self.groups * (chunk.stop - chunk.start) * chunk.keys, 1)
            fit = max(self.budget // per_head, 1)
            batches = max(min(fit // self.kv_heads, self.batch), 1)
            heads = min(fit, self.kv_heads)
            for b in range(0, self.batch, batches):
                for h in range(0, self.kv_heads, heads):
                    yield Piece(slice(b, b + batches), slice(h, h + heads), chunk)

    def _rows(self) -> int:
        """Queries per chunk, so that one head fits. The first or the last queries visit the most keys."""
        ends = (0, min(ROWS, self.q_len)), (max(self.q_len - ROWS, 0), self.q_len)
        widest = max(sum(run.stop - run.start for run in self.walker.bounded(*rows)) for rows in ends)
        return max(min(ROWS, self.budget // max(self.groups * widest, 1)), 1)

    def rows(self, grouped: Tensor, piece: Piece) -> Tensor:
        """A piece of a tensor from :meth:`by_group`."""
        return grouped[piece.batches, piece.kv_heads, :, piece.chunk.start : piece.chunk.stop]

    def visited(self, tensor: Tensor, piece: Piece) -> Tensor:
        """The keys (or values) that a piece visits: [b, hkv, n, D]."""
        heads = tensor[piece.batches, piece.kv_heads]
        parts = [heads[:, :, start:stop] for start, stop in piece.chunk.slices()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def indices(self, piece: Piece) -> dict[str, Any]:
        """Values of every symbol but ``s`` and ``k``; they broadcast against [b, hkv, G, rows, n]."""
        batches = range(self.batch)[piece.batches]
        heads = range(self.kv_heads)[piece.kv_heads]
        return {
            **self.names,
            "Nq": self.q_len,
            "Nk": self.k_len,
            "b": self.span([(batches.start, batches.stop)], -1, 1, 1, 1, 1),
            "h": self.span([(heads.start * self.groups, heads.stop * self.groups)], 1, -1, self.groups, 1, 1),
            "q": self.span([(piece.chunk.start, piece.chunk.stop)], -1, 1),
        }

    def span(self, parts: Sequence[tuple[int, int]], *shape: int) -> Span:
        return Span.of(parts, self.device, *shape)

    def all_keys(self, piece: Piece) -> Span:
        return self.span(piece.chunk.slices())

    def evaluate(self, term: Any, symbols: dict[str, Any]) -> Any:
        return evaluate(term, symbols, self.captures, self.dtype, self.device)

    def scores(self, piece: Piece, query: Tensor, key: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Masked scores [b, hkv, G, rows, n] and the symbols with ``s`` and ``k`` (for derivatives).

        ``query`` [b, hkv, G, rows, D] and ``key`` [b, hkv, n, D] are those of the piece.
        """
        symbols = self.indices(piece)
        groups, rows = query.shape[2:4]
        if self.only_scale is not None:
            query = query * self.only_scale
        raw = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, (groups, rows))
        score = raw
        if self.only_scale is None:
            symbols |= {"s": raw, "k": self.all_keys(piece)}
            score = self.evaluate(self.plan.spec.score, symbols)
            if not isinstance(score, Tensor):
                score = raw.new_full((), score)
            score = score.to(self.dtype)
            if score is raw or score.shape != raw.shape:
                score = score.expand_as(raw).clone()
        _mask(score, self._conditions(piece, symbols))
        return score, symbols

    def additive(self, piece: Piece) -> Tensor | None:
        """The summand of ``scale * s``: the bias, and -inf where the rule does not hold. None if there is neither.

        [b or 1, hkv or 1, G or 1, rows, n]; 1 where neither bias nor rule depends on the dimension.
        """
        symbols = self.indices(piece)
        conditions = self._conditions(piece, symbols)
        bias = self.evaluate(self.bias, {**symbols, "k": self.all_keys(piece)})
        if not conditions and self.bias == 0:
            return None
        tensors = [value for value in (bias, *(kept for _, kept in conditions)) if isinstance(value, Tensor)]
        leading = torch.broadcast_shapes((1, 1, 1), *(value.shape[:-2] for value in tensors))
        shape = (*leading, piece.chunk.stop - piece.chunk.start, piece.chunk.keys)
        added = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if self.bias != 0:
            added += bias
        _mask(added, conditions)
        return added

    def empty_rows(self, piece: Piece, added: Tensor | None) -> Tensor | None:
        """Queries without keys, from the result of :meth:`additive`: bool [b, hkv, G, rows]; None if there are none."""
        structural = self.bias == 0 and self.tile_ranges.residual == sympy.true
        certain = structural and any(run.full for run in piece.chunk.runs)
        if added is None or certain:
            return None
        return added.amax(dim=-1) == -torch.inf

    def kept(self, piece: Piece, keys: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Which weights dropout keeps: bool [b, hkv, G, rows, n]. ``keys``: intervals; None: those that are visited."""
        symbols, spec = self.indices(piece), self.plan.spec
        pairs = plain(symbols["b"]) * self.heads + plain(symbols["h"])
        rows = (piece.chunk.start, piece.chunk.stop)
        keys = piece.chunk.slices() if keys is None else keys
        return philox.kept(self.captures[DROPOUT_SEED], spec.least_kept, pairs, rows, keys)

    def dropout(self, piece: Piece) -> Callable[[Tensor], Tensor]:
        """What happens to the weights of a piece after the softmax, and to their gradients before it."""
        if not self.plan.spec.dropout:
            return lambda weights: weights
        lost, scale = ~self.kept(piece), self.plan.spec.kept_scale
        return lambda weights: (weights * scale).masked_fill_(lost, 0.0)

    def _conditions(self, piece: Piece, symbols: dict[str, Any]) -> list[tuple[slice, Tensor | bool]]:
        """Conditions by columns of the visited keys. The structural condition is evaluated only in runs that need
        it."""
        conditions, column = [], 0
        for run in piece.chunk.runs:
            width = run.stop - run.start
            if not run.full:
                kept = self.evaluate(self.tile_ranges.structural, {**symbols, "k": self.span([(run.start, run.stop)])})
                conditions.append((slice(column, column + width), kept))
            column += width
        if self.tile_ranges.residual != sympy.true:
            kept = self.evaluate(self.tile_ranges.residual, {**symbols, "k": self.all_keys(piece)})
            conditions.append((slice(0, column), kept))
        return conditions


def _mask(score: Tensor, conditions: list[tuple[slice, Tensor | bool]]) -> None:
    """Set scores to -inf where a condition does not hold, in place."""
    for columns, kept in conditions:
        if isinstance(kept, Tensor):
            score[..., columns].masked_fill_(~kept, -torch.inf)
        elif not kept:
            score[..., columns].fill_(-torch.inf)


def dropped_mean(call: Call, piece: Piece, like: Tensor) -> Tensor:
    """The output of queries without keys, where it is a mean, after dropout: [b, hkv, G, rows, Dv], as ``like``."""
    found = torch.empty_like(like, dtype=call.dtype)
    share = call.plan.spec.kept_scale / max(call.k_len, 1)
    batches, heads = range(call.batch)[piece.batches], range(call.kv_heads)[piece.kv_heads]
    for b, h in itertools.product(range(len(batches)), range(len(heads))):  # all keys, however few the piece visits
        one = Piece(slice(batches[b], batches[b] + 1), slice(heads[h], heads[h] + 1), piece.chunk)
        kept = call.kept(one, [(0, call.k_len)])[0, 0].to(call.dtype) * share
        found[b, h] = kept @ call.value[batches[b], heads[h]].to(call.dtype)
    return found


def empty_output(spec: AttentionSpec, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The output of a query without keys: [B, Hkv, 1, 1, Dv]."""
    batch, kv_heads, _, dim = value.shape
    if spec.empty_output == "mean":
        return value.mean(dim=2, dtype=dtype)[:, :, None, None]
    fill = torch.nan if spec.empty_output == "nan" else 0.0
    return value.new_full((), fill, dtype=dtype).expand(batch, kv_heads, 1, 1, dim)
