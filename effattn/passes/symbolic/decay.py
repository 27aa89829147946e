"""The reader for attention without a softmax: it also reads powers, and sees through the last cast of a decay mask."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.pointwise import aligned, distribute
from effattn.passes.symbolic.reader import Index, Reader, Reading

_HALF = (torch.float16, torch.bfloat16)


class DecayReader(Reader):
    """Reads ``gamma ** (i - j)``, and sees through the cast of a finished decay mask to half precision.

    The weights are then more exact than the user's, as scores are elsewhere. Rounded positions become captured tensors.
    """

    def _define(self, node: fx.Node) -> Reading | None:
        call = self.view.call(node)
        if call is not None and call.name == "pow":
            return _power(self, call, self.view.shape(node))
        reading = super()._define(node)
        if reading is None and call is not None and call.casts:
            return self._finished_mask(call)
        return reading

    def _finished_mask(self, call: Call) -> Reading | None:
        before, after = self.view.tensor(call.get("input")), self.view.tensor(call.node)
        if before is None or after is None or before.dtype != torch.float32 or after.dtype not in _HALF:
            return None
        reading = self.argument(call, "input")
        probe = reading.at(tuple(sympy.Symbol(f"i{n}", integer=True, nonnegative=True) for n in reading.shape))
        return reading if _is_decay(probe) else None


def _is_decay(value: Any) -> bool:
    """Whether ``value`` is a power, a constant, or a ``where`` of such values."""
    if isinstance(value, expr.Where):
        return all(_is_decay(branch) for branch in value.args[1:])
    return value.is_number or isinstance(value, (sympy.exp, sympy.Pow))


def _power(reader: Reader, call: Call, shape: tuple) -> Reading | None:
    base, exponent = reader.argument(call, "input"), reader.argument(call, "exponent")
    tensor = reader.view.tensor(call.node)
    if tensor is None or tensor.dtype not in (torch.float32, torch.float64):
        return None

    def at(index: Index):
        terms = (operand.number_at(aligned(operand, index, shape)) for operand in (base, exponent))
        return distribute(sympy.Pow, *terms)

    return Reading(shape, "float", at)
