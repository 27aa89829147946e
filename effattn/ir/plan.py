"""The plan: everything one op needs besides its tensors, in one string.

An op receives only tensors and a plan string, so a graph that another process loads from Inductor's cache keeps its
meaning. Kernels see expressions, not forms: the keys that a form keeps are already in ``keep``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import sympy

from effattn.errors import PlanError
from effattn.ir import expr
from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.selector import Selector

VERSION = 8
LAYOUTS = ("bhnd", "bnhd")
Kernel = Literal["auto", "sdpa", "generated"]
KERNELS: tuple[Kernel, ...] = ("auto", "sdpa", "generated")


@dataclass(frozen=True)
class Sparsity:
    """How the keys to visit are found: from predicate and ``keep``, or by a selector among those."""

    select: Selector | None = None  # chooses among the kept keys at run time; None: visits all of them
    blocks: tuple[int, int] | None = None  # queries and keys of a block of the block map that the op is passed


@dataclass(frozen=True)
class Dispatch:
    """Where and when a plan runs. It does not change what the plan computes."""

    min_length: int = 0  # with fewer keys, ``below`` runs instead (decided when the op runs)
    below: Plan | None = None  # the plan below ``min_length``; None: dense, every key the mask allows
    target: str | None = None  # a name in TARGETS of runtime/targets/choice.py, or None: by device
    layout: str = "bhnd"  # memory order of the output; its shape is always [B, H, Nq, Dv]
    lse_is_read: bool = True  # False: only the backward reads the LSE, as with SDPA
    kernel: Kernel = "auto"  # what computes attention that SDPA's kernels compute too; auto: what measured faster

    def encode(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "min_length": self.min_length,
            "below": None if self.below is None else self.below.encode(),
            "target": self.target,
            "layout": self.layout,
            "lse": self.lse_is_read,
            "kernel": self.kernel,
        }

    @staticmethod
    def decode(body: dict[str, Any]) -> Dispatch:
        """The inverse of :meth:`encode`. Raises PlanError, KeyError, TypeError or ValueError for other data."""
        if body["layout"] not in LAYOUTS:
            raise PlanError(f"bad layout in plan: {body['layout']!r}; allowed: {LAYOUTS}")
        if body["kernel"] not in KERNELS:
            raise PlanError(f"bad kernel in plan: {body['kernel']!r}; allowed: {KERNELS}")
        if not isinstance(body["target"], str | None):
            raise PlanError(f"bad target in plan: {body['target']!r}; it is a name, or null")
        return Dispatch(
            min_length=int(body["min_length"]),
            below=None if body["below"] is None else Plan.decode(body["below"]),
            target=body["target"],
            layout=body["layout"],
            lse_is_read=bool(body["lse"]),
            kernel=body["kernel"],
        )


@dataclass(frozen=True)
class Plan:
    """What the op ``effattn::attend`` computes (``spec``), how it finds keys (``sparsity``), where and when it runs."""

    form: str  # name of the form, for the report and for file names
    spec: AttentionSpec
    sparsity: Sparsity = field(default_factory=Sparsity)
    dispatch: Dispatch = field(default_factory=Dispatch)

    def dense(self) -> Plan:
        """The same site without the form: every key the mask allows."""
        dispatch = replace(self.dispatch, min_length=0, below=None)
        return Plan("exact", self.spec.dense(), dispatch=dispatch)

    def at(self, k_len: int) -> Plan:
        """The plan that runs with this many keys.

        That is ``below`` (or the dense plan) under ``min_length``, and the dense plan where the selector keeps all
        keys. Its captures include ``FIRST_KEY``, as the last, if it is read.
        """
        if k_len < self.dispatch.min_length:
            return self._dense if self.dispatch.below is None else self.dispatch.below.at(k_len)
        select = self.sparsity.select
        return self._dense if select is not None and select.keeps_all(k_len) else self.complete

    def dispatched(self, **changes: Any) -> Plan:
        """The same plan with some fields of ``dispatch`` changed."""
        return replace(self, dispatch=replace(self.dispatch, **changes))

    def reading_lse(self) -> Plan:
        """The same plan with ``lse_is_read`` at every length."""
        below = self.dispatch.below
        return self.dispatched(lse_is_read=True, below=None if below is None else below.reading_lse())

    @property
    def selects(self) -> bool:
        """Whether a selector chooses keys at some length."""
        below = self.dispatch.below
        return self.sparsity.select is not None or (below is not None and below.selects)

    @cached_property
    def _dense(self) -> Plan:
        return self.dense()

    @cached_property
    def of_empty_rows(self) -> Plan:
        """The plan of the queries without keys alone, where these have uniform weights.

        Its last capture, bool [B, Hq, Nq], says which they are. They see every key, and a large number leaves their
        scores equal.
        """
        spec, mask = self.spec, CaptureSpec("without_keys", "bool", 3)
        predicate = sympy.Ne(expr.load(mask.name, (expr.b, expr.h, expr.q), integer=True), 0)
        score = spec.score + sympy.Float(expr.LOWEST)
        captures = (*spec.captures, mask)
        alone = AttentionSpec(score, predicate, sympy.true, captures, spec.scalars, spec.numbers, dropout=spec.dropout)
        return Plan("exact", alone, dispatch=Dispatch(layout=self.dispatch.layout))

    @cached_property
    def complete(self) -> Plan:
        """The plan with ``FIRST_KEY`` among its captures if its form reads it."""
        return self if self.spec.complete is self.spec else replace(self, spec=self.spec.complete)

    def encode(self) -> str:
        """The canonical string; equal plans give equal bytes in any process."""
        select = self.sparsity.select
        body = {
            "v": VERSION,
            "form": self.form,
            "spec": self.spec.encode(),
            "blocks": None if self.sparsity.blocks is None else list(self.sparsity.blocks),
            "select": None if select is None else select.model_dump(mode="json"),
            "dispatch": self.dispatch.encode(),
        }
        return json.dumps(body, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def decode(text: str) -> Plan:
        """The inverse of :meth:`encode`.

        Raises:
            PlanError: the string is malformed or has another version.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"a plan must be JSON: {error}") from error
        if not isinstance(body, dict) or body.get("v") != VERSION:
            raise PlanError(f"this plan was not written by plan version {VERSION}; compile the model again")
        try:
            if not isinstance(body["form"], str) or not body["form"].isidentifier():
                raise PlanError(f"bad form name in plan: {body['form']!r}")
            select = None if body["select"] is None else Selector.decode(body["select"])
            blocks = None if body["blocks"] is None else (int(body["blocks"][0]), int(body["blocks"][1]))
            spec, dispatch = AttentionSpec.decode(body["spec"]), Dispatch.decode(body["dispatch"])
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"a plan lacks or misuses a field: {error!r}") from error
        return Plan(body["form"], spec, Sparsity(select, blocks), dispatch)
