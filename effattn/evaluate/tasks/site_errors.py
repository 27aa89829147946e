"""Errors of forms at one attention of a real run: error of the output, recovered mass, density, the oracle's mass.

Scores and softmax are computed once for all forms, in float32 and in chunks of queries, so memory is bounded by query,
key, value and one chunk of scores. The output of a form is the op's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effattn.compiler.capture import Captured
from effattn.errors import EvaluationError
from effattn.evaluate.tasks.kept import Rows, allowed_rows, indices, kept_rows, reach
from effattn.evaluate.tasks.oracle import Tile, by_tiles, oracle
from effattn.ir.plan import Plan
from effattn.ir.refusal import Refusal
from effattn.ir.site import Op
from effattn.lowering.forms import FORMS
from effattn.passes.choose.choice import choose
from effattn.passes.choose.routes import plan_of
from effattn.policy import Policy
from effattn.runtime.algebra import bindings, evaluate

BLOCK = 128  # of the oracle, for forms without blocks
SCORES = 2**20  # most scores of a head group at a time, at least one query block: they fit in a CPU's cache


@dataclass(frozen=True)
class Lowered:
    """What a policy makes of a site."""

    form: str
    plan: Plan
    tile: Tile  # of the oracle: queries and keys that the form chooses together
    reason: str
    refusals: tuple[Refusal, ...] = ()  # of forms that the policy names


@dataclass(frozen=True)
class FormErrors:
    """One form at one site, over all heads and queries."""

    form: str
    error: float  # Frobenius norm of the difference from dense / norm of dense
    mass: float  # share of the dense softmax on kept keys, mean over heads and queries
    density: float  # kept pairs / allowed pairs
    oracle_mass: float
    oracle_density: float
    block: int
    unit: int
    mass_by_head: tuple[float, ...]


def lower(captured: Captured, policy: Policy) -> Lowered:
    """The plan of a site under a policy; exact where no form of the policy applies.

    Raises:
        EvaluationError: site or form has no softmax, so kept keys are undefined.
    """
    choice = choose(captured.match, policy, strict=False, target=None)
    if captured.site.op is not Op.SOFTMAX:
        raise EvaluationError(f"{captured.site.path or captured.site.name} has no softmax: no form changes it")
    if not FORMS[choice.form].softmax:
        raise EvaluationError(
            f"policy {policy.name!r} makes {captured.site.path or captured.site.name} {choice.form!r}, which has no "
            "softmax: error and mass by layer say nothing of it; leave out the task errors and measure perplexity"
        )
    if captured.site.spec.dropout:
        raise EvaluationError(f"{captured.site.path or captured.site.name} drops weights at random, also in eval()")
    plan = choice.plan or plan_of(captured.site, "exact", choice.params, 0, None)
    block = int(getattr(choice.params, "block", BLOCK))
    tile = block, int(getattr(choice.params, "unit", block))
    refusals = tuple(refusal for one in choice.considered for refusal in one.refusals)
    return Lowered(choice.form, plan, tile, choice.reason, refusals)


@torch.no_grad()
def site_errors(captured: Captured, forms: Sequence[Lowered]) -> list[FormErrors]:
    """Measure all forms on one captured attention."""
    dense = _Dense(captured, forms)
    dense.run()
    return [dense.errors(number, _difference(captured, lowered, dense.out)) for number, lowered in enumerate(forms)]


def _difference(captured: Captured, lowered: Lowered, dense: Tensor) -> float:
    """Relative error of the op's output. Queries without keys are the same in both."""
    given = (captured.query, captured.key, captured.value, captured.captures, captured.scalars, captured.numbers)
    out, _ = torch.ops.effattn.attend(*given, lowered.plan.encode())
    norm = float(torch.linalg.vector_norm(dense))
    apart = float(torch.linalg.vector_norm(out.float().sub_(dense)))
    return apart / norm if norm else (0.0 if apart == 0 else math.inf)


class _Dense:
    """One pass over the queries: the dense output, and sums per form and head."""

    def __init__(self, captured: Captured, forms: Sequence[Lowered]):
        self.captured, self.forms = captured, forms
        self.batch, self.heads, self.rows, self.keys = captured.shape
        self.kv_heads = captured.key.shape[1]
        self.groups = self.heads // self.kv_heads
        self.plan = forms[0].plan.dense()
        device = captured.query.device
        shape = (self.batch, self.heads, self.rows, captured.value.shape[3])
        self.out = torch.zeros(shape, dtype=torch.float32, device=device)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        self.counted = zeros(self.heads)  # queries with at least one allowed key
        self.allowed = zeros()  # pairs of all batches and heads
        self.mass, self.oracle_mass = zeros(len(forms), self.heads), zeros(len(forms), self.heads)
        self.kept, self.oracle_kept = zeros(len(forms)), zeros(len(forms))
        self.names, self.captures = bindings(self.plan.spec, captured.captures, captured.scalars, captured.numbers)

    def run(self) -> None:
        chunks = self._chunks()
        allowed = allowed_rows(self.captured, self.plan, chunks)
        kept = [kept_rows(self.captured, lowered.plan, chunks) for lowered in self.forms]
        ends = reach(self.captured, self.plan, chunks)
        for rows, end, mask, *masks in zip(chunks, ends, allowed, *kept, strict=True):
            mask = mask[..., :end]
            self._chunk(rows, mask, [other[..., :end] & mask for other in masks])

    def errors(self, number: int, error: float) -> FormErrors:
        lowered = self.forms[number]
        counted = self.counted.clamp(min=1)
        by_head = (self.mass[number] / counted).tolist()
        pairs = max(float(self.allowed), 1.0)
        return FormErrors(
            form=lowered.form,
            error=error,
            mass=sum(by_head) / len(by_head),
            density=float(self.kept[number]) / pairs,
            oracle_mass=float((self.oracle_mass[number] / counted).mean()),
            oracle_density=float(self.oracle_kept[number]) / pairs,
            block=lowered.tile[0],
            unit=lowered.tile[1],
            mass_by_head=tuple(by_head),
        )

    def _chunks(self) -> list[Rows]:
        """Chunks that are whole query blocks of every form."""
        step = math.lcm(*(lowered.tile[0] for lowered in self.forms))
        step *= max(1, SCORES // (step * self.groups * max(self.keys, 1)))
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def _chunk(self, rows: Rows, allowed: Tensor, masks: list[Tensor]) -> None:
        if not allowed.shape[-1]:
            return
        self.allowed += _pairs(allowed, self.batch * self.heads)
        tiles = {lowered.tile for lowered in self.forms}
        whole = {tile: by_tiles(allowed.float(), tile) for tile in tiles}
        kept = [_Kept(mask, lowered.tile) for mask, lowered in zip(masks, self.forms, strict=True)]
        for number, mask in enumerate(masks):
            self.kept[number] += _pairs(mask, self.batch * self.heads)
        for b in range(self.batch):
            for g in range(self.kv_heads):
                heads = slice(g * self.groups, (g + 1) * self.groups)
                weights = self._weights(rows, b, g, heads, _part(allowed, b, heads))
                values = self.captured.value[b, g, : allowed.shape[-1]].float()
                self.out[b, heads, rows[0] : rows[1]] = weights @ values
                self.counted[heads] += (weights.amax(dim=-1) > 0).sum(dim=-1)
                by_tile = {tile: by_tiles(weights, tile) for tile in tiles}
                for number, lowered in enumerate(self.forms):
                    mask, touched = kept[number].of(b, heads)
                    self.mass[number, heads] += (weights * mask).sum(dim=-1).double().sum(dim=-1)
                    chosen = oracle(by_tile[lowered.tile], touched, _part(whole[lowered.tile], b, heads))
                    self.oracle_mass[number, heads] += chosen.mass.double().sum(dim=-1)
                    self.oracle_kept[number] += chosen.pairs.double().sum()

    def _weights(self, rows: Rows, b: int, g: int, heads: slice, allowed: Tensor) -> Tensor:
        """Dense softmax of a head group: float32 [G, rows, keys]; zero for queries without keys."""
        keys = allowed.shape[-1]
        query = self.captured.query[b, heads, rows[0] : rows[1]].float()
        raw = query @ self.captured.key[b, g, :keys].float().transpose(0, 1)
        symbols: dict[str, Any] = {**self.names, **indices(self.captured, rows, keys), "s": raw}
        symbols["b"] = b
        symbols["h"] = torch.arange(heads.start, heads.stop, device=raw.device).view(-1, 1, 1)
        score = evaluate(self.plan.spec.score, symbols, self.captures, torch.float32, raw.device)
        score = torch.as_tensor(score, dtype=torch.float32, device=raw.device).expand_as(raw)
        return score.where(allowed, -torch.inf).softmax(dim=-1).nan_to_num_(nan=0.0)


class _Kept:
    """The mask of one form and chunk as float32, by head group; computed once if all heads share it."""

    def __init__(self, mask: Tensor, tile: Tile):
        self.mask, self.tile = mask, tile
        self.shared = self._numbers(mask[0]) if mask.shape[:2] == (1, 1) else None

    def of(self, b: int, heads: slice) -> tuple[Tensor, Tensor]:
        """(0 or 1 per pair, kept pairs per tile): float32 [G or 1, rows, keys] and [G or 1, tiles, tiles]."""
        return self.shared or self._numbers(_part(self.mask, b, heads))

    def _numbers(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        numbers = mask.float()
        return numbers, by_tiles(numbers, self.tile)


def _pairs(mask: Tensor, times: int) -> Tensor:
    """Number of pairs where a mask holds, which may be broadcast over batches and heads."""
    return mask.sum(dtype=torch.float64) * (times // (mask.shape[0] * mask.shape[1]))


def _part(mask: Tensor, b: int, heads: slice) -> Tensor:
    """[G or 1, ...] of a [B or 1, Hq or 1, ...]."""
    mask = mask[b if mask.shape[0] > 1 else 0]
    return mask[heads] if mask.shape[0] > 1 else mask
