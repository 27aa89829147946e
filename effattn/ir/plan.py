"""The plan: everything that one rewritten attention means, in one string.

An op receives tensors and a plan string and nothing else, so a compiled graph that a second process loads from
Inductor's cache still means the same. Forms do not appear at run time: a form has already said which keys it keeps
(``keep``), and kernels only see expressions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import sympy

from effattn.errors import PlanError
from effattn.ir import expr, wire
from effattn.ir.selector import Selector

VERSION = 3
EmptyRows = Literal["never", "zero", "nan", "mean"]
EMPTY_ROWS: tuple[EmptyRows, ...] = ("never", "zero", "nan", "mean")
LAYOUTS = ("bhnd", "bnhd")
TARGETS = ("triton", "portable", None)


@dataclass(frozen=True)
class LoadSpec:
    """One data tensor that the predicate or score reads: its name in expressions, dtype and number of dimensions."""

    name: str
    dtype: str  # as in torch, without "torch.": "bool", "int64", "float32"
    ndim: int


@dataclass(frozen=True)
class Plan:
    """What the op ``effattn::attend`` computes.

    out[b, h, q] = softmax over kept k of score(s = query[b, h, q] . key[b, h // G, k]) times value[b, h // G, k],
    with k kept where ``predicate & keep`` holds.
    """

    form: str  # name of the form, for the report and for file names
    score: Any  # sympy term in s and the indices; natural units, scale included
    predicate: Any = sympy.true  # what the author's mask allows
    keep: Any = sympy.true  # what the form keeps of that
    loads: tuple[LoadSpec, ...] = ()  # in the order in which tensors are passed
    scalars: tuple[str, ...] = ()  # names of integers passed at run time, in order
    numbers: tuple[str, ...] = ()  # names of floats passed at run time, in order
    empty_rows: EmptyRows = "zero"  # output of a row that may attend to nothing: 0, NaN, or the mean of all values
    min_length: int = 0  # below this many keys the form keeps everything (the choice is made when the op runs)
    layout: str = "bhnd"  # memory order of the output; its shape is always [B, H, Nq, Dv]
    target: str | None = None  # "triton", "portable", or None: by device
    select: Selector | None = None  # what of the rule is visited, decided by data at run time; None: all of it
    below: Plan | None = None  # what is computed below ``min_length``; None: everything that the mask allows
    lse_is_read: bool = True  # False: the LSE serves the gradient alone, as SDPA's own does

    @cached_property
    def rule(self) -> Any:
        """The whole predicate: what is both allowed and kept."""
        return sympy.And(self.predicate, self.keep)

    def dense(self) -> Plan:
        """The same site without the form: keeps all that the mask allows."""
        dense = replace(self, form="exact", keep=sympy.true, min_length=0, select=None, below=None)
        return dense.given

    def at(self, k_len: int) -> Plan:
        """What is computed for this many keys: ``below``, or the dense plan, where there are fewer than ``min_length``;
        the dense plan where a selector keeps all. Its loads are all that it reads, with ``FIRST_KEY`` as the last."""
        if k_len < self.min_length:
            return self._dense if self.below is None else self.below.at(k_len)
        return self._dense if self.select is not None and self.select.keeps_all(k_len) else self.complete

    @cached_property
    def complete(self) -> Plan:
        """The plan with the load that no caller passes, if its form reads it."""
        if any(spec.name == expr.FIRST_KEY for spec in self.loads) or not self.keep.has(expr.first_key):
            return self
        return replace(self, loads=(*self.loads, LoadSpec(expr.FIRST_KEY, "int32", 1)))

    @cached_property
    def given(self) -> Plan:
        """The plan with the loads that callers pass."""
        return replace(self, loads=tuple(spec for spec in self.loads if spec.name != expr.FIRST_KEY))

    def reading_lse(self) -> Plan:
        """The same where somebody reads the LSE, at every length."""
        return replace(self, lse_is_read=True, below=None if self.below is None else self.below.reading_lse())

    @property
    def selects(self) -> bool:
        """Whether at some length data decides what is visited."""
        return self.select is not None or (self.below is not None and self.below.selects)

    @cached_property
    def _dense(self) -> Plan:
        return self.dense()

    def encode(self) -> str:
        """The canonical string: equal plans give equal bytes, in any process."""
        body = {
            "v": VERSION,
            "form": self.form,
            "score": wire.encode(self.score),
            "predicate": wire.encode(self.predicate),
            "keep": wire.encode(self.keep),
            "loads": [[spec.name, spec.dtype, spec.ndim] for spec in self.loads],
            "scalars": list(self.scalars),
            "numbers": list(self.numbers),
            "empty_rows": self.empty_rows,
            "min_length": self.min_length,
            "layout": self.layout,
            "target": self.target,
            "select": None if self.select is None else self.select.model_dump(mode="json"),
            "below": None if self.below is None else self.below.encode(),
            "lse": self.lse_is_read,
        }
        return json.dumps(body, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def decode(text: str) -> Plan:
        """The plan in a string that :meth:`encode` wrote.

        Raises:
            PlanError: not such a string, or written by another version.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"a plan must be JSON: {error}") from error
        if not isinstance(body, dict) or body.get("v") != VERSION:
            raise PlanError(f"this plan was not written by plan version {VERSION}; compile the model again")
        try:
            return _checked(body)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"a plan lacks or misuses a field: {error!r}") from error


def _checked(body: dict) -> Plan:
    if not isinstance(body["form"], str) or not body["form"].isidentifier():
        raise PlanError(f"bad form name in plan: {body['form']!r}")
    for field, allowed in (("empty_rows", EMPTY_ROWS), ("layout", LAYOUTS), ("target", TARGETS)):
        if body[field] not in allowed:
            raise PlanError(f"bad {field} in plan: {body[field]!r}; allowed: {allowed}")
    loads = tuple(LoadSpec(str(name), str(dtype), int(ndim)) for name, dtype, ndim in body["loads"])
    names = [*(spec.name for spec in loads), *body["scalars"], *body["numbers"]]
    if not all(isinstance(name, str) and name.isidentifier() for name in names) or len(set(names)) < len(names):
        raise PlanError(f"names in a plan must be distinct identifiers: {names}")
    plan = Plan(
        form=body["form"],
        score=wire.decode(body["score"]),
        predicate=wire.decode(body["predicate"]),
        keep=wire.decode(body["keep"]),
        loads=loads,
        scalars=tuple(body["scalars"]),
        numbers=tuple(body["numbers"]),
        empty_rows=body["empty_rows"],
        min_length=int(body["min_length"]),
        layout=body["layout"],
        target=body["target"],
        select=None if body["select"] is None else Selector.decode(body["select"]),
        below=None if body["below"] is None else Plan.decode(body["below"]),
        lse_is_read=bool(body["lse"]),
    )
    known = {spec.name for spec in loads}
    used = {term.name for term in expr.loads_of(plan.score, plan.predicate, plan.keep)}
    if not used - {expr.FIRST_KEY} <= known:
        raise PlanError(f"a plan reads tensors that it does not list: {sorted(used - known)}")
    return plan
