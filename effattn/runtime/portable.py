"""Any plan on any device, through ATen, chunk by chunk: memory grows with Nq + Nk, never with their product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.ir.plan import Plan
from effattn.runtime.algebra import bindings, evaluate
from effattn.runtime.chunks import Chunk, Walker, walk_of
from effattn.runtime.sdpa import constant_scale

SCORES = 2**24  # most elements of one block of scores: 64 MiB in float32
ROWS = 128


@dataclass(frozen=True)
class Piece:
    """A part of one call that is computed at once: some batches, some kv heads, one chunk of rows."""

    batches: slice
    kv_heads: slice
    chunk: Chunk


class Call:
    """One call of a plan: its tensors in head-grouped views, its names bound, its pieces."""

    def __init__(
        self,
        plan: Plan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        loads: Sequence[Tensor],
        scalars: Sequence[int],
        numbers: Sequence[float],
    ):
        self.plan = plan
        self.batch, self.heads, self.q_len, self.head_dim = query.shape
        self.kv_heads, self.k_len, self.value_dim = key.shape[1], key.shape[2], value.shape[3]
        self.groups = self.heads // self.kv_heads
        self.device = query.device
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.query = self.by_group(query)
        self.key, self.value = key, value
        self.names, self.loads = bindings(plan, loads, scalars, numbers)
        self.walk = walk_of(plan.rule)
        self.walker = Walker(plan.rule, (self.batch, self.heads, self.q_len, self.k_len), self.names, self.loads)
        self.scale = constant_scale(plan.score, {**self.names, "Nq": self.q_len, "Nk": self.k_len})

    def by_group(self, tensor: Tensor) -> Tensor:
        """[B, Hq, Nq, ...] as [B, Hkv, G, Nq, ...]."""
        return tensor.unflatten(1, (self.kv_heads, self.groups))

    def pieces(self) -> Iterator[Piece]:
        """The whole call in pieces whose scores fit the budget."""
        for chunk in self.walker.chunks(self._rows()):
            per_head = max(self.groups * (chunk.stop - chunk.start) * chunk.keys, 1)
            fit = max(SCORES // per_head, 1)
            batches = max(min(fit // self.kv_heads, self.batch), 1)
            heads = min(fit, self.kv_heads)
            for b in range(0, self.batch, batches):
                for h in range(0, self.kv_heads, heads):
                    yield Piece(slice(b, b + batches), slice(h, h + heads), chunk)

    def _rows(self) -> int:
        return max(min(ROWS, SCORES // max(self.groups * self.k_len, 1)), 1)

    def rows(self, grouped: Tensor, piece: Piece) -> Tensor:
        """A piece of a tensor of :meth:`by_group`."""
        return grouped[piece.batches, piece.kv_heads, :, piece.chunk.start : piece.chunk.stop]

    def visited(self, tensor: Tensor, piece: Piece) -> Tensor:
        """The keys (or values) that a piece visits: [b, hkv, n, D] in the computing dtype."""
        heads = tensor[piece.batches, piece.kv_heads]
        parts = [heads[:, :, start:stop] for start, stop in piece.chunk.slices()]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).to(self.dtype)

    def indices(self, piece: Piece) -> dict[str, Any]:
        """Values of every symbol but ``s`` and ``k``, to broadcast against [b, hkv, G, rows, n]."""
        batches = range(self.batch)[piece.batches]
        heads = range(self.kv_heads)[piece.kv_heads]
        head = torch.arange(heads.start * self.groups, heads.stop * self.groups, device=self.device)
        return {
            **self.names,
            "Nq": self.q_len,
            "Nk": self.k_len,
            "b": torch.arange(batches.start, batches.stop, device=self.device).view(-1, 1, 1, 1, 1),
            "h": head.view(1, -1, self.groups, 1, 1),
            "q": torch.arange(piece.chunk.start, piece.chunk.stop, device=self.device).view(-1, 1),
        }

    def keys(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.device)

    def all_keys(self, piece: Piece) -> Tensor:
        return torch.cat([self.keys(*part) for part in piece.chunk.slices()])

    def evaluate(self, term: Any, symbols: dict[str, Any]) -> Any:
        return evaluate(term, symbols, self.loads, self.dtype, self.device)

    def scores(self, piece: Piece, query: Tensor, key: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Masked scores [b, hkv, G, rows, n] and the symbols with ``s`` and ``k`` (for derivatives).

        ``query`` [b, hkv, G, rows, D] and ``key`` [b, hkv, n, D] are those of the piece.
        """
        symbols = self.indices(piece)
        if self.scale is not None:
            query = query * self.scale
        groups, rows = query.shape[2:4]
        raw = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, (groups, rows))
        if self.scale is None:
            symbols |= {"s": raw, "k": self.all_keys(piece)}
            score = self.evaluate(self.plan.score, symbols)
            score = torch.as_tensor(score, dtype=self.dtype, device=self.device).expand_as(raw)
            score = score.clone() if score is raw or not score.is_contiguous() else score
        else:
            score = raw
        self._mask(score, piece, symbols)
        return score, symbols

    def _mask(self, score: Tensor, piece: Piece, symbols: dict[str, Any]) -> None:
        """-inf where the rule does not hold, in place; the structure is asked only where it is not known."""
        column = 0
        if self.walk.structural != sympy.true:
            for run in piece.chunk.runs:
                width = run.stop - run.start
                if not run.full:
                    kept = self.evaluate(self.walk.structural, {**symbols, "k": self.keys(run.start, run.stop)})
                    _fill(score[..., column : column + width], kept)
                column += width
        if self.walk.residual != sympy.true:
            _fill(score, self.evaluate(self.walk.residual, {**symbols, "k": self.all_keys(piece)}))


def _fill(score: Tensor, kept: Tensor | bool) -> None:
    if isinstance(kept, Tensor):
        score.masked_fill_(~kept, -torch.inf)
    elif not kept:
        score.fill_(-torch.inf)


def empty_output(plan: Plan, value: Tensor, dtype: torch.dtype) -> Tensor | float:
    """What a row that keeps nothing gets: a number, or [B, Hkv, 1, 1, Dv]."""
    if plan.empty_rows == "mean":
        return value.mean(dim=2, dtype=dtype)[:, :, None, None]
    return torch.nan if plan.empty_rows == "nan" else 0.0


def allocate(layout: str, like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised [B, H, N, D] tensor in a memory order of plans, dtype and device as ``like``."""
    batch, heads, length, dim = shape
    if layout == "bnhd":
        return like.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return like.new_empty((batch, heads, length, dim))


def allocate_output(plan: Plan, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (out [B, Hq, Nq, Dv] in the plan's memory order and q's dtype, lse [B, Hq, Nq] float32)."""
    batch, heads, q_len, _ = query.shape
    out = allocate(plan.layout, query, (batch, heads, q_len, value.shape[3]))
    return out, query.new_empty((batch, heads, q_len), dtype=torch.float32)


def run(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    loads: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a plan, as ``effattn::attend`` defines them. Scores are computed in float32 (or float64)."""
    call = Call(plan, query, key, value, loads, scalars, numbers)
    out, lse = allocate_output(plan, query, value)
    grouped_out, grouped_lse = call.by_group(out), call.by_group(lse)
    instead = empty_output(plan, value, call.dtype)
    for piece in call.pieces():
        out_rows, lse_rows = call.rows(grouped_out, piece), call.rows(grouped_lse, piece)
        fill = instead[piece.batches, piece.kv_heads] if isinstance(instead, Tensor) else instead
        if not piece.chunk.runs:
            out_rows.copy_(torch.as_tensor(fill, device=call.device).expand_as(out_rows))
            lse_rows.fill_(-torch.inf)
            continue
        score, _ = call.scores(piece, call.rows(call.query, piece).to(call.dtype), call.visited(key, piece))
        top = score.amax(dim=-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        weights = score.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        product = (weights.flatten(2, 3) @ call.visited(value, piece)).unflatten(2, weights.shape[2:4])
        out_rows.copy_(torch.where(total == 0, fill, product / total))
        lse_rows.copy_((top + total.log()).squeeze(-1))
    return out, lse
