"""Expressions as Triton source text: the algebra that :func:`effattn.ir.fold.fold` is given for kernels.

A value knows along which axes of the tile it varies: not at all (a scalar), along its query rows (``{"q"}``, a
vector), along its keys (``{"k"}``, a vector), or both (a tile). Vectors are broadcast only where they meet. Whatever
does not vary along keys is computed once, before the loop over key tiles.

Whole numbers are exact, as an expression means them: a value also knows between which numbers it lies, and what may not
fit into 32 bits is computed in 64.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from effattn.ir import bounds
from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.bounds import INT32, INT64, TRUTH, UNKNOWN, Interval, around
from effattn.ir.expr import INDICES
from effattn.ir.fold import UnknownOperation

SCALAR: frozenset[str] = frozenset()
ROWS = frozenset("q")
KEYS = frozenset("k")
TILE = ROWS | KEYS

# how tightly Python binds, loosest first
COMPARE, OR, AND, SHIFT, SUM, PRODUCT, UNARY, ATOM = range(8)
LONGEST = 60
UNLIMITED = 1 << 30

SMALL_INTEGERS = {"bool", "int8", "uint8", "int16", "uint16"}
UNSIGNED = {"uint32", "uint64"}  # which 32 bits with a sign do not hold
LENGTH = 2**28  # sizes, indices and scalars are taken to be no larger, unless a kernel is made for larger ones
NARROW = around(LENGTH)  # of which a sum of a few still fits into 32 bits
FAR = around(2**62)  # what a kernel for larger ones takes them to be


@dataclass(frozen=True)
class Value:
    """Source text of a value, the axes along which it varies, its kind and how tightly its text binds."""

    text: str
    axes: frozenset[str] = SCALAR
    kind: str = "int"  # "int", "float", "bool"
    level: int = ATOM
    plain: bool = False  # an index symbol that is known to lie within the tensor
    tile: tuple[str, int] | None = None  # of consecutive indices: the first one, a multiple of how many there are
    bounds: Interval = NARROW  # of a whole number; of others they say nothing
    wide: bool = False  # the text has 64 bits for certain

    @property
    def literal(self) -> bool:
        """Whether the text is a number, which takes the width of what it meets."""
        return self.text.lstrip("-").isdigit()

    def widened(self) -> Value:
        """The same in 64 bits."""
        return self if self.wide else replace(self, text=f"{self.at(ATOM)}.to(tl.int64)", level=ATOM, wide=True)

    def at(self, level: int) -> str:
        """The text, in parentheses if it binds less tightly than ``level``."""
        return self.text if self.level >= level else f"({self.text})"

    def spread(self, axes: frozenset[str], level: int = COMPARE) -> str:
        """The text as an operand of something that varies along ``axes``."""
        if len(axes) < 2 or self.axes in (SCALAR, TILE):
            return self.at(level)
        return self.at(ATOM) + ("[:, None]" if self.axes == ROWS else "[None, :]")


@dataclass
class Lines:
    """Assignments that expressions need, and the names they got: each distinct text is computed once."""

    lines: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def inner(self) -> Lines:
        """Lines of a loop body: the names given so far are not given again."""
        return Lines(taken=self.taken)

    def assign(self, stem: str, text: str) -> str:
        if text not in self.names:
            name = next(name for i in range(len(self.taken) + 1) if (name := f"{stem}_{i}") not in self.taken)
            self.names[text] = name
            self.taken.add(name)
            self.lines.append(f"{name} = {text}")
        return self.names[text]


COMPARISONS = {"le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!="}
BOOLEANS = {"and": ("&", AND), "or": ("|", OR)}
FUNCTIONS = {"abs": "tl.abs", "min": "tl.minimum", "max": "tl.maximum"}
FLOAT_FUNCTIONS = {
    **{name: f"tl.{name}" for name in ("exp", "exp2", "log", "sqrt", "sin", "cos")},
    "tanh": "_tanh",
}
BITS = {"bit_and": "&", "bit_or": "|", "bit_xor": "^"}
WHOLE = {"add", "mul", "min", "max", "abs", "floordiv", "mod", "sign", "is_power_of_two", *BITS, *COMPARISONS}
HELPERS = {"floordiv": "_floor_div", "mod": "_modulo", "sign": "_sign"}


class Source:
    """The algebra whose values are pieces of Triton source."""

    def __init__(
        self,
        symbols: dict[str, Value],
        captures: dict[str, CaptureSpec],
        before: Lines,
        inside: Lines | None = None,
        key_mask: str = "",
        row_mask: str = "row_ok",
        longest: int = LONGEST,
    ):
        """
        Args:
            symbols: what q, k, b, h, s, the lengths, scalars and numbers are called in the source.
            before: takes assignments that do not vary along keys.
            inside: takes the others (the body of a loop); None where nothing varies along keys.
            key_mask: name of a vector that says which keys exist; empty if all of the tile do.
            row_mask: the same for rows.
            longest: text of an inner expression that is longer gets a name.
        """
        self.symbols = symbols
        self.captures = captures
        self.before = before
        self.inside = inside if inside is not None else before
        self.key_mask = key_mask
        self.row_mask = row_mask
        self.longest = longest

    def constant(self, value):
        if isinstance(value, int) and not isinstance(value, bool):
            return _whole_number(value)
        kind = "bool" if isinstance(value, bool) else "float"
        text = repr(value) if value == value and abs(value) != float("inf") else f'float("{value}")'
        return Value(text, kind=kind, level=UNARY if text.startswith("-") else ATOM)

    def symbol(self, name):
        return self.symbols[name]

    def call(self, operation, *args):
        value = self._call(operation, *args)
        if len(value.text) <= self.longest:
            return value
        lines = self.inside if "k" in value.axes else self.before
        return replace(value, text=lines.assign("part", value.text), level=ATOM)

    def _call(self, operation, *args):
        if operation == "group":
            return args[0]
        found = bounds.TABLE[operation](*(TRUTH if arg.kind == "bool" else arg.bounds for arg in args))
        narrow = operation in WHOLE and all(arg.kind == "int" and not arg.wide for arg in args)
        if narrow and not found.joined(*(arg.bounds for arg in args)).within(INT32):
            # one operand of 64 bits is enough: the others follow
            first = next(place for place, arg in enumerate(args) if not arg.literal)
            args = (*args[:first], args[first].widened(), *args[first + 1 :])
        value = self._operation(operation, *args)
        wide = any(arg.wide for arg in args if arg.kind == "int")
        return replace(value, bounds=found, wide=wide) if value.kind == "int" else value

    def _operation(self, operation, *args):
        axes = frozenset().union(*(arg.axes for arg in args))
        number = "float" if any(arg.kind == "float" for arg in args) else "int"
        if operation == "add":
            return _add(args[0], args[1], axes, number)
        if operation == "mul":
            return _multiply(args[0], args[1], axes, number)
        if operation == "div":
            left, right = (self._float(arg) for arg in args)
            return Value(f"{left.spread(axes, PRODUCT)} / {right.spread(axes, UNARY)}", axes, "float", PRODUCT)
        if operation in COMPARISONS:
            left, right = (arg.spread(axes, OR) for arg in args)
            return Value(f"{left} {COMPARISONS[operation]} {right}", axes, "bool", COMPARE)
        if operation in BOOLEANS:
            sign, level = BOOLEANS[operation]
            left, right = (arg.spread(axes, level) for arg in args)
            return Value(f"{left} {sign} {right}", axes, "bool", level)
        if operation in BITS:
            left, right = (arg.spread(axes, SHIFT) for arg in args)
            return Value(f"({left} {BITS[operation]} {right})", axes)
        if operation == "not":
            return Value(f"~{args[0].at(UNARY)}", axes, "bool", UNARY)
        if operation in FUNCTIONS:
            return _function(FUNCTIONS[operation], args, axes, number)
        if operation in FLOAT_FUNCTIONS:
            return _function(FLOAT_FUNCTIONS[operation], [self._float(arg) for arg in args], axes, "float")
        if operation == "where":
            kind = "float" if any(arg.kind == "float" for arg in args[1:]) else args[1].kind
            return _function("tl.where", args, axes, kind)
        if operation == "is_power_of_two":
            return _function("_is_power_of_two", args, axes, "bool")
        if operation == "floordiv" and (first := _one_block(*args)) is not None:
            return self._call(operation, first, args[1])
        if operation in ("floordiv", "mod") and (shift := _exact_log2(args[1])) is not None:
            return _by_power_of_two(operation, args[0], shift, axes)
        if operation in HELPERS:
            return _function(HELPERS[operation], args, axes, number)
        raise UnknownOperation(f"the Triton target has no operation {operation!r}")

    def load(self, name, indices):
        spec = self.captures[name]
        axes = frozenset().union(*(index.axes for index in indices)) if indices else SCALAR
        parts = [f"data_{name}"]
        masks = []
        if "q" in axes:
            masks.append(Value(self.row_mask, ROWS).spread(axes))
        if "k" in axes and self.key_mask:
            masks.append(Value(self.key_mask, KEYS).spread(axes))
        for dim, index in enumerate(indices):
            if index.text == "0":
                continue
            stride = f"{name}_stride_{dim}"
            constant = index.text.isdigit()
            wide = index.text if constant else f"{index.at(ATOM)}.to(tl.int64)"
            parts.append(Value(f"{wide} * {stride}", index.axes, level=PRODUCT).spread(axes, SUM))
            if not (index.plain or constant):
                size = f"{name}_size_{dim}"
                inside = Value(f"({index.at(OR)} >= 0) & ({index.at(OR)} < {size})", index.axes, "bool", AND)
                masks.append(inside.spread(axes, ATOM))
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        text = f"tl.load({' + '.join(parts)}{mask})"
        kind = "float" if spec.dtype.startswith(("float", "bfloat")) else "int"
        if kind == "float":
            text += "" if spec.dtype == "float32" else ".to(tl.float32)"
        elif spec.dtype in SMALL_INTEGERS:
            text += ".to(tl.int32)"
        elif spec.dtype in UNSIGNED:
            text += ".to(tl.int64)"
        lines = self.inside if "k" in axes else self.before
        found = bounds.INTEGERS.get(spec.dtype, UNKNOWN)
        return Value(lines.assign(name, text), axes, kind, bounds=found, wide=kind == "int" and not found.within(INT32))

    def _float(self, value: Value) -> Value:
        if value.kind == "float":
            return value
        if value.literal:
            return self.constant(float(value.text))
        return Value(f"{value.at(ATOM)}.to(tl.float32)", value.axes, "float")


def _whole_number(value: int) -> Value:
    found = Interval(value, value)
    if found.within(INT32):
        return Value(str(value), level=UNARY if value < 0 else ATOM, bounds=found)
    if not found.within(INT64):
        raise UnknownOperation(f"no kernel computes with {value}")
    return Value(f"tl.full([], {value}, tl.int64)", bounds=found, wide=True)


def all_symbols(indices: dict[str, Value], attention: AttentionSpec, wide: bool) -> dict[str, Value]:
    """Values of the indices and the score, as they are given, and of lengths, scalars and numbers."""
    found = {"Nq": Value("q_len"), "Nk": Value("k_len"), **indices}
    found |= {name: Value(f"scalar_{name}") for name in attention.scalars}
    found |= {name: Value(f"number_{name}", kind="float") for name in attention.numbers}
    return {name: replace(value, bounds=FAR, tile=None) for name, value in found.items()} if wide else found


def tested_dims(load) -> list[int]:
    """Dimensions of a load whose index is neither an index symbol nor a constant: the kernel tests their bounds."""
    return [dim for dim, index in enumerate(load.indices) if not (index in INDICES or index.is_Integer)]


def _add(left: Value, right: Value, axes, kind) -> Value:
    if left.text.startswith("-") and not right.text.startswith("-"):
        left, right = right, left
    if right.text.startswith("-") and right.level >= PRODUCT:
        positive = replace(right, text=right.text[1:], level=min(right.level, PRODUCT))
        return Value(f"{left.spread(axes, SUM)} - {positive.spread(axes, PRODUCT)}", axes, kind, SUM)
    return Value(f"{left.spread(axes, SUM)} + {right.spread(axes, PRODUCT)}", axes, kind, SUM)


def _multiply(left: Value, right: Value, axes, kind) -> Value:
    if left.text == "-1":
        return Value(f"-{right.spread(axes, UNARY)}", axes, kind, UNARY)
    return Value(f"{left.spread(axes, PRODUCT)} * {right.spread(axes, UNARY)}", axes, kind, PRODUCT)


def _function(name: str, args, axes, kind) -> Value:
    return Value(f"{name}({', '.join(arg.spread(axes) for arg in args)})", axes, kind)


def _one_block(index: Value, divisor: Value) -> Value | None:
    """The first index of a tile that lies within one block of so many: the quotient is one number for all of it."""
    if index.tile is None or not divisor.text.isdigit() or int(divisor.text) % index.tile[1] or divisor.text == "0":
        return None
    return Value(index.tile[0])


def _exact_log2(divisor: Value) -> int | None:
    if not divisor.text.isdigit() or int(divisor.text) <= 0 or int(divisor.text) & (int(divisor.text) - 1):
        return None
    return int(divisor.text).bit_length() - 1


def _by_power_of_two(operation: str, value: Value, shift: int, axes) -> Value:
    """Shifts and masks round down for negative numbers too; Triton's own ``//`` and ``%`` round towards zero."""
    if operation == "floordiv":
        return Value(f"({value.at(SHIFT)} >> {shift})", axes)
    return Value(f"({value.at(AND)} & {(1 << shift) - 1})", axes)
