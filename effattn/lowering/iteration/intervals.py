"""Interval arithmetic on blocks of queries and keys: an algebra over another algebra.

In it the value of a number is a :class:`Range`, which contains it for every query and key of a pair of blocks, and that
of a condition a :class:`Truth`: may it hold for some pair, does it hold for all. The ends are values of the algebra
below: Triton source in kernels, tensors in ATen. So both compute the same, and what neither can say is "perhaps".

Kernels test conditions in float32, and compilers may fuse a product with a sum, so what was computed in floating point
is widened by more than such a rounding. An end that is NaN says that nothing is known, not even that it is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from effattn.ir import bounds
from effattn.ir.bounds import INT64, TRUTH, UNKNOWN, Interval, around
from effattn.ir.fold import Algebra
from effattn.lowering.iteration.interval_rules import (
    CONDITIONS,
    FLOATS,
    FUNCTIONS,
    INTEGERS,
    OF_FLOATS,
    UNROUNDED,
    unknown_float_of,
)
from effattn.lowering.iteration.ranges import SAFE, Range, Truth, ends_of, is_safe

MOST_READ = 16  # elements of a captured tensor that are read for one pair of blocks
ROUNDING = 2.0**-20  # relative, of one floating point operation
OF_FUNCTION = 2.0**-12  # of exp, tanh, ... on any device
TINY = 1e-30
LARGEST = 3.0e38
# dtypes of which PyTorch finds the least and the greatest
ORDERED = frozenset(["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"])


class BlockAlgebra:
    """The algebra whose values are ranges and truths."""

    def __init__(
        self,
        below: Algebra,
        ranges: Mapping[str, Range],
        load: Callable[[str, Sequence[Range]], Range],
        symbol_bounds: Interval,
    ):
        """
        Args:
            below: computes the ends.
            ranges: of the symbols that are not the same for all pairs: ``q`` and ``k``.
            load: the range of an element of a captured tensor.
            symbol_bounds: of all other integer symbols.
        """
        self.below, self.ranges, self.read, self.symbol_bounds = below, ranges, load, symbol_bounds
        self.do = below.call

    def constant(self, value):
        found = self.below.constant(value)
        if isinstance(value, bool):
            return Truth(found, found)
        if isinstance(value, int):
            return Range(found, found, "int", Interval(value, value), value, 0)
        return Range(found, found, "float", number=value, span=0)

    def symbol(self, name):
        if name in self.ranges:
            return self.ranges[name]
        found = self.below.symbol(name)
        kind = "float" if isinstance(found, float) or getattr(found, "kind", "int") == "float" else "int"
        return Range(found, found, kind, self.symbol_bounds, span=0)

    def load(self, name, indices):
        return self.read(name, indices)

    def call(self, operation, *args):
        if operation == "group":
            return args[0]
        if operation in CONDITIONS:
            return CONDITIONS[operation](self, *args)
        floats = any(isinstance(arg, Range) and arg.kind == "float" for arg in args)
        if floats or operation in OF_FLOATS:
            return self._finite(operation, args, FLOATS.get(operation, unknown_float_of)(self, *args))
        numbers = [arg for arg in args if isinstance(arg, Range)]
        known = bounds.TABLE[operation](*(arg.bounds if isinstance(arg, Range) else TRUTH for arg in args))
        if all(arg.exact for arg in args) and known.within(INT64) and all(map(is_safe, numbers)):
            value = self.do(operation, *(arg.low if isinstance(arg, Range) else arg.some for arg in args))
            return Range(value, value, "int", known, span=0)
        found = INTEGERS[operation](self, *args)
        tighter = Interval(max(found.bounds.low, known.low), min(found.bounds.high, known.high))
        return replace(found, bounds=tighter if known.within(INT64) else found.bounds)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def least(self, *values):
        return self._chain("min", values)

    def most(self, *values):
        return self._chain("max", values)

    def _chain(self, operation, values):
        found = values[0]
        for value in values[1:]:
            found = found if value is found else self.do(operation, found, value)
        return found

    def unknown(self, within: Interval = INT64) -> Range:
        """Any integer of an interval."""
        low, high = (self.below.constant(int(end)) for end in within)
        return Range(low, high, "int", within)

    def unknown_float(self) -> Range:
        nan = self.below.constant(float("nan"))
        return Range(nan, nan, "float")

    def where_safe(self, args: Sequence[Range], found: Range, limit: int = SAFE) -> Range:
        """``found``, or unknown where an end of ``args`` is so large that the operation may not fit into int64."""
        for arg in args:
            if arg.bounds.within(around(limit)):
                continue
            inside = self.do(
                "and",
                self.do("ge", arg.low, self.below.constant(-limit)),
                self.do("le", arg.high, self.below.constant(limit)),
            )
            nothing = self.unknown()
            low, high = (
                self.do("where", inside, found.low, nothing.low),
                self.do("where", inside, found.high, nothing.high),
            )
            found = Range(low, high, "int")
        return found

    def _finite(self, operation, args, found: Range) -> Range:
        """Widen what was rounded; NaN if an end of it or of an argument is not finite."""
        low, high = found.low, found.high
        floats = [arg for arg in args if isinstance(arg, Range)]
        if operation not in UNROUNDED:
            size = self._sizes(floats) if operation == "add" else self._sizes([found])
            by = OF_FUNCTION if operation in FUNCTIONS else ROUNDING
            margin = self.do("add", self.do("mul", size, self.below.constant(by)), self.below.constant(TINY))
            low = self.do("add", low, self.do("mul", self.below.constant(-1.0), margin))
            high = self.do("add", high, margin)
        ends = [low, high, *(end for arg in floats if arg.kind == "float" for end in ends_of(arg))]
        finite = [self.do("lt", self.do("abs", end), self.below.constant(LARGEST)) for end in ends]
        nan = self.below.constant(float("nan"))
        low, high = (self.do("where", self._chain("and", finite), end, nan) for end in (low, high))
        return Range(low, high, "float")

    def _sizes(self, ranges: Sequence[Range]):
        """The sum of the largest absolute values. Sums in another order round by no more than that."""
        sizes = [self.most(*(self.do("abs", end) for end in ends_of(each))) for each in ranges]
        return self._chain("add", sizes)

    def ends(self, operation, x: Range, y: Range) -> Range:
        """Of a function of two numbers whose extremes lie at the ends of its arguments."""
        values = [self.do(operation, one, other) for one, other in product(ends_of(x), ends_of(y))]
        return Range(self.least(*values), self.most(*values), x.kind)


@dataclass(frozen=True)
class Chunks:
    """The least and the greatest of so many consecutive elements of a dimension of a captured tensor.

    Both are tensors like it, with an element for each chunk in that dimension.
    """

    name: str
    dim: int
    size: int

    @property
    def names(self) -> tuple[str, str]:
        """Those of both tensors; no captured tensor has such a name."""
        return tuple(f"{self.name}__{which}_{self.dim}_{self.size}" for which in ("least", "most"))  # type: ignore


def element(
    algebra: BlockAlgebra, name: str, indices: Sequence[Range], dtype: str, given: Callable[[Chunks], bool]
) -> Range:
    """The range of an element of a captured tensor.

    ``given``: whether the algebra below may read both tensors of some chunks.
    """
    spans = [None if index.span is None else index.span + 1 for index in indices]
    if None in spans or dtype not in ORDERED:
        return few_elements(algebra, name, indices, dtype)
    widest = max(range(len(spans)), key=lambda dim: spans[dim] or 0, default=0)
    others = prod(span for dim, span in enumerate(spans) if dim != widest)  # type: ignore[misc]
    chunks = Chunks(name, widest, 1)
    while others * _touched(spans[widest] if spans else 1, chunks.size) > MOST_READ:
        if others > MOST_READ // 2:
            return _any_element(algebra, dtype)
        chunks = replace(chunks, size=2 * chunks.size)
    if chunks.size == 1:
        return few_elements(algebra, name, indices, dtype)
    if not given(chunks):
        return _any_element(algebra, dtype)
    size = algebra.constant(chunks.size)
    places = [algebra.call("floordiv", index, size) if dim == widest else index for dim, index in enumerate(indices)]
    least, most = (few_elements(algebra, each, places, dtype) for each in chunks.names)
    return Range(least.low, most.high, least.kind, least.bounds)


def _touched(elements: int | None, size: int) -> int:
    """Chunks of which so many consecutive elements are part."""
    return 1 if elements is None else elements if size == 1 else (elements - 1) // size + 2


def _any_element(algebra: BlockAlgebra, dtype: str) -> Range:
    return algebra.unknown_float() if _is_float(dtype) else algebra.unknown(_of(dtype))


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def few_elements(algebra: BlockAlgebra, name: str, indices: Sequence[Range], dtype: str) -> Range:
    """The range of an element of a captured tensor: of the few that the indices may mean, or of its dtype."""
    spans = [None if index.span is None else index.span + 1 for index in indices]
    floating = _is_float(dtype)
    if None in spans or prod(spans) > MOST_READ:  # type: ignore[arg-type]
        return _any_element(algebra, dtype)
    places = [_places(algebra, index, span) for index, span in zip(indices, spans, strict=True)]  # type: ignore[arg-type]
    values = [algebra.below.load(name, list(place)) for place in product(*places)]
    if len(values) == 1:
        (value,) = values
        return Range(value, value, "float" if floating else "int", _of(dtype), span=0)
    low, high = algebra.least(*values), algebra.most(*values)
    if not floating:
        return Range(low, high, "int", _of(dtype))
    # minimum and maximum need not hand on what is not a number
    numbers = algebra._chain("and", [algebra.do("eq", value, value) for value in values])
    nan = algebra.below.constant(float("nan"))
    return Range(algebra.do("where", numbers, low, nan), algebra.do("where", numbers, high, nan), "float")


def _places(algebra: BlockAlgebra, index: Range, count: int) -> list:
    if count == 1:
        return [index.low]
    steps = [algebra.do("add", index.low, algebra.below.constant(step)) for step in range(1, count)]
    return [index.low, *(algebra.do("min", step, index.high) for step in steps)]


def _of(dtype: str) -> Interval:
    found = bounds.INTEGERS.get(dtype, UNKNOWN)
    return found if found.within(INT64) else INT64
