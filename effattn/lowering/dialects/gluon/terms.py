"""Expressions as Gluon source: Triton's, with other names, and with layouts that follow from the vectors they start at.

``rows`` and ``keys`` are vectors in slices of the layout of the scores, so whatever is computed from them has a layout
that fits, and needs none of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from effattn.ir import bounds
from effattn.ir.bounds import around
from effattn.lowering.dialects.triton.device_functions import DEVICE_FUNCTIONS
from effattn.lowering.dialects.triton.terms import Source

EXACT = around(2**24)  # integers that float32 holds


class GluonSource(Source):
    """The algebra whose values are Gluon source.

    Sums of positions that end up in a float are added as floats: converting each element of a tile would keep the unit
    busy that computes exponentials.
    """

    language: ClassVar[str] = "gl"
    int64: ClassVar[str] = "gl.to_tensor({})"

    def _operation(self, operation, *args):
        if any(arg.kind == "float" for arg in args):
            args = tuple(arg.as_float or arg for arg in args)
        value = super()._operation(operation, *args)
        if operation not in ("add", "mul") or value.kind != "int":
            return value
        parts = (*args, replace(value, bounds=bounds.TABLE[operation](*(arg.bounds for arg in args))))
        if not any(arg.as_float for arg in args) or not all(part.bounds.within(EXACT) for part in parts):
            return value
        return replace(value, as_float=super()._operation(operation, *map(self._float, args)))


class FastSource(GluonSource):
    """With the chip's own tanh: one instruction, relative error 2**-11, which suffices where weights are 16 bits."""

    tanh: ClassVar[str] = "_fast_tanh"


FAST_TANH = '''
@gluon.jit
def _fast_tanh(x):
    """The chip's own; relative error 2**-11."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
'''


def in_gluon(text: str) -> str:
    """A device function, or scalar code, of Triton in Gluon."""
    return text.replace("@triton.jit", "@gluon.jit").replace("tl.", "gl.")


GLUON_FUNCTIONS = {"_fast_tanh": FAST_TANH, **{name: in_gluon(text) for name, text in DEVICE_FUNCTIONS.items()}}
