"""Attention without a softmax: its weights and their normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy

from effattn.ir.expr import k, q, s

State = Literal["none", "carried", "stepped"]


@dataclass(frozen=True)
class LinearSpec:
    """out[q] = sum over k of weight(q, k) * value[k], with weight = scale * s * exp(rate * (q - k)).

    ``normalised``: the sum is divided by the sum of weights plus ``eps``.
    """

    scale: float
    rate: Any | None  # decay, a term in h and captured tensors with one number per head; None: no decay
    causal: bool  # only keys k <= q have a weight
    normalised: bool = False
    eps: float = 0.0
    state: State = "none"  # "carried": enters or leaves a loop over blocks; "stepped": a loop over single tokens

    @property
    def weight(self) -> Any:
        """The weight of an allowed key, as a term in s and the indices."""
        scale = sympy.Integer(1) if self.scale == 1 else sympy.Float(self.scale)
        return scale * s * (1 if self.rate is None else sympy.exp(self.rate * (q - k)))

    @property
    def predicate(self) -> Any:
        """The allowed keys."""
        return sympy.Le(k, q) if self.causal else sympy.true
