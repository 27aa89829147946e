"""Attention without a softmax: what its weights are, and what they are divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy

from effattn.ir.expr import k, q, s

State = Literal["none", "carried", "stepped"]


@dataclass(frozen=True)
class LinearSpec:
    """out[q] = sum over k of weight(q, k) * value[k], with weight = scale * s * exp(rate * (q - k)).

    With ``normalised`` the sum is divided by that of the weights, plus ``eps``.
    """

    scale: float
    rate: Any | None  # a term in h and in captured tensors of one number per head; None: no decay
    causal: bool  # for k <= q alone
    normalised: bool = False
    eps: float = 0.0
    state: State = "none"  # enters or leaves a loop over blocks of tokens; "stepped": a loop over tokens after a state

    @property
    def weight(self) -> Any:
        """The weight of a key that has one, as a term in s and the indices."""
        scale = sympy.Integer(1) if self.scale == 1 else sympy.Float(self.scale)
        return scale * s * (1 if self.rate is None else sympy.exp(self.rate * (q - k)))

    @property
    def predicate(self) -> Any:
        """Which keys have a weight."""
        return sympy.Le(k, q) if self.causal else sympy.true
