"""What one attention computes: score, predicate, kept keys and the captured tensors they read.

Where, when and how fast it runs is not part of it, so sites that compute the same function hold equal records and share
a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import sympy

from effattn.errors import PlanError
from effattn.ir import expr, wire

EmptyRows = Literal["never", "zero", "nan", "mean", "uniform"]
EMPTY_ROWS: tuple[EmptyRows, ...] = ("never", "zero", "nan", "mean", "uniform")
DROPOUT_SEED = "dropout_seed"  # the captured tensor from which random bits are made

DROPOUT_STEPS = 2**16  # a probability is rounded to a multiple of one over it


@dataclass(frozen=True)
class CaptureSpec:
    """A captured tensor that the predicate or score reads."""

    name: str
    dtype: str  # torch's name without "torch.": "bool", "int64", "float32"
    ndim: int


@dataclass(frozen=True)
class AttentionSpec:
    """The function that an op computes.

    out[b, h, q] = softmax(score(s = query[b, h, q] . key[b, h // G, k])) . value[b, h // G, k], over the keys k where
    ``predicate & keep`` holds. With ``dropout`` each weight, after the softmax, is either 0 or divided by 1 - dropout;
    ``effattn.runtime.philox`` says which. The LSE is that of all keys.
    """

    score: Any  # sympy term in s and the indices; natural exponent, scale included
    predicate: Any = sympy.true  # what the user's mask allows
    keep: Any = sympy.true  # which of these keys a form keeps
    captures: tuple[CaptureSpec, ...] = ()  # captured tensors, in the order they are passed
    scalars: tuple[str, ...] = ()  # names of integers passed at run time, in order
    numbers: tuple[str, ...] = ()  # names of floats passed at run time, in order
    # output where no key is allowed: 0, NaN, or the mean of all values. Its gradient reaches the values; if it is
    # "uniform", a softmax of scores that a large number leaves equal, also query and key
    empty_rows: EmptyRows = "zero"
    dropout: float = 0.0  # probability of a weight to be dropped, less than 1

    @cached_property
    def rule(self) -> Any:
        """``predicate & keep``."""
        return sympy.And(self.predicate, self.keep)

    @property
    def empty_output(self) -> Literal["zero", "nan", "mean"]:
        """The output where no key is allowed."""
        return "mean" if self.empty_rows == "uniform" else "zero" if self.empty_rows == "never" else self.empty_rows

    @property
    def kept_scale(self) -> float:
        """What dropout multiplies the weights by that it keeps, so that their mean stays as it is."""
        return DROPOUT_STEPS / (DROPOUT_STEPS - self._steps_dropped)

    @property
    def _steps_dropped(self) -> int:
        return min(round(self.dropout * DROPOUT_STEPS), DROPOUT_STEPS - 1)

    @property
    def least_kept(self) -> int:
        """The least random number of 16 bits, signed, with which dropout keeps a weight."""
        return self._steps_dropped - DROPOUT_STEPS // 2

    @cached_property
    def seeded(self) -> AttentionSpec:
        """The record with ``DROPOUT_SEED`` (int64, no dimensions) among its captures if it has dropout."""
        if not self.dropout or any(load.name == DROPOUT_SEED for load in self.captures):
            return self
        return replace(self, captures=(*self.captures, CaptureSpec(DROPOUT_SEED, "int64", 0)))

    def dense(self) -> AttentionSpec:
        """The same without a form: every key the mask allows, and only captures that callers pass."""
        return replace(self.given, keep=sympy.true)

    @cached_property
    def complete(self) -> AttentionSpec:
        """The record with ``FIRST_KEY`` as its last capture if ``keep`` reads it. Callers do not pass that tensor."""
        read = [load for load in expr.loads_of(self.keep) if load.name == expr.FIRST_KEY]
        if any(load.name == expr.FIRST_KEY for load in self.captures) or not read:
            return self
        return replace(self, captures=(*self.captures, CaptureSpec(expr.FIRST_KEY, "int32", len(read[0].indices))))

    @cached_property
    def given(self) -> AttentionSpec:
        """The record with only the captures that callers pass."""
        return replace(self, captures=tuple(load for load in self.captures if load.name != expr.FIRST_KEY))

    def encode(self) -> dict[str, Any]:
        """JSON values; equal records give equal bytes in any process."""
        return {
            "score": wire.encode(self.score),
            "predicate": wire.encode(self.predicate),
            "keep": wire.encode(self.keep),
            "captures": [[load.name, load.dtype, load.ndim] for load in self.captures],
            "scalars": list(self.scalars),
            "numbers": list(self.numbers),
            "empty_rows": self.empty_rows,
            "dropout": self.dropout,
        }

    @staticmethod
    def decode(body: dict[str, Any]) -> AttentionSpec:
        """The inverse of :meth:`encode`.

        Raises:
            PlanError: invalid names, tensors or expressions.
            KeyError, TypeError, ValueError: a field is missing or has the wrong type.
        """
        if body["empty_rows"] not in EMPTY_ROWS:
            raise PlanError(f"bad empty_rows in plan: {body['empty_rows']!r}; allowed: {EMPTY_ROWS}")
        captures = tuple(CaptureSpec(str(name), str(dtype), int(ndim)) for name, dtype, ndim in body["captures"])
        names = [*(load.name for load in captures), *body["scalars"], *body["numbers"]]
        if not all(isinstance(name, str) and name.isidentifier() for name in names) or len(set(names)) < len(names):
            raise PlanError(f"names in a plan must be distinct identifiers: {names}")
        spec = AttentionSpec(
            score=wire.decode(body["score"]),
            predicate=wire.decode(body["predicate"]),
            keep=wire.decode(body["keep"]),
            captures=captures,
            scalars=tuple(body["scalars"]),
            numbers=tuple(body["numbers"]),
            empty_rows=body["empty_rows"],
            dropout=float(body["dropout"]),
        )
        used = {load.name for load in expr.loads_of(spec.score, spec.predicate, spec.keep)}
        if unknown := used - {expr.FIRST_KEY} - {load.name for load in captures}:
            raise PlanError(f"a plan reads tensors that it does not list: {sorted(unknown)}")
        if not 0.0 <= spec.dropout < 1.0 or spec.seeded is not spec:
            raise PlanError(f"a plan with dropout={spec.dropout} needs a probability below 1 and the seed")
        return spec
