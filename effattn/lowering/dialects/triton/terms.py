"""Expressions as Triton source: the algebra for :func:`effattn.ir.fold.fold` in kernels.

A value records the axes of the tile along which it varies: none (a scalar), queries (``{"q"}``, a vector), keys
(``{"k"}``, a vector) or both (a tile). Vectors are broadcast only where they meet. Values that do not vary along keys
are computed once, before the loop over key tiles.

Integers must be exact. A value also records its interval, and operations that may not fit into 32 bits are computed in
64.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from effattn.ir import bounds
from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.bounds import INT32, INT64, TRUTH, UNKNOWN, Interval, around
from effattn.ir.expr import INDICES
from effattn.ir.fold import UnknownOperation

SCALAR: frozenset[str] = frozenset()
ROWS = frozenset("q")
KEYS = frozenset("k")
TILE = ROWS | KEYS

# Python's operator precedence, loosest first
COMPARE, OR, AND, SHIFT, SUM, PRODUCT, UNARY, ATOM = range(8)
LONGEST = 60
UNLIMITED = 1 << 30

SMALL_INTEGERS = {"bool", "int8", "uint8", "int16", "uint16"}
UNSIGNED = {"uint32", "uint64"}  # do not fit into int32
LENGTH = 2**28  # upper bound of sizes, indices and scalars, except in kernels that are specialised for larger ones
NARROW = around(LENGTH)  # a sum of a few of these still fits into 32 bits
FAR = around(2**62)  # the bound in kernels for larger ones


@dataclass(frozen=True)
class Value:
    """Source text of a value, the axes along which it varies, its kind and the precedence of its text."""

    text: str
    axes: frozenset[str] = SCALAR
    kind: str = "int"  # "int", "float", "bool"
    level: int = ATOM
    plain: bool = False  # an index symbol known to be within bounds
    tile: tuple[str, int] | None = None  # (first, count) of consecutive indices, first a multiple of count
    bounds: Interval = NARROW  # of an integer; meaningless for other kinds
    wide: bool = False  # the text is known to be int64
    as_float: Value | None = None  # the same integer in float32, if that is exact and cheaper than converting

    @property
    def literal(self) -> bool:
        """Whether the text is a number, which takes the dtype of the other operand."""
        return self.text.lstrip("-").isdigit()

    def at(self, level: int) -> str:
        """The text, parenthesised if its precedence is lower than ``level``."""
        return self.text if self.level >= level else f"({self.text})"

    def spread(self, axes: frozenset[str], level: int = COMPARE) -> str:
        """The text, broadcast as an operand of an expression that varies along ``axes``."""
        if len(axes) < 2 or self.axes in (SCALAR, TILE):
            return self.at(level)
        return self.at(ATOM) + ("[:, None]" if self.axes == ROWS else "[None, :]")


@dataclass
class Lines:
    """Assignments and the names they define. Each distinct text is computed once."""

    lines: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def inner(self) -> Lines:
        """Lines of a loop body; they do not reuse names from outside."""
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
FUNCTIONS = {"abs": "abs", "min": "minimum", "max": "maximum"}
FLOAT_FUNCTIONS = ("exp", "exp2", "log", "sqrt", "sin", "cos")
BITS = {"bit_and": "&", "bit_or": "|", "bit_xor": "^"}
WHOLE = {"add", "mul", "min", "max", "abs", "floordiv", "mod", "sign", "is_power_of_two", *BITS, *COMPARISONS}
HELPERS = {"floordiv": "_floor_div", "mod": "_modulo", "sign": "_sign"}


class Source:
    """The algebra whose values are Triton source."""

    language: ClassVar[str] = "tl"  # the module with the operations
    tanh: ClassVar[str] = "_tanh"
    int64: ClassVar[str] = "tl.full([], {}, tl.int64)"  # a constant of that type

    def __init__(
        self,
        symbols: dict[str, Value],
        captures: dict[str, CaptureSpec],
        before: Lines,
        inside: Lines | None = None,
        key_mask: str = "",
        row_mask: str = "row_ok",
        longest: int = LONGEST,
        share: bool = False,
    ):
        """
        Args:
            symbols: values of q, k, b, h, s, the lengths, scalars and numbers.
            before: receives assignments that do not vary along keys.
            inside: receives the others (the loop body); None where nothing varies along keys.
            key_mask: name of the mask of keys in bounds; empty if all keys of the tile are.
            row_mask: the same for queries, and empty where only indices are tested.
            longest: an inner expression with a longer text gets a name.
            share: so does every tanh, exp, ..., because derivatives read it again.
        """
        self.symbols = symbols
        self.captures = captures
        self.before = before
        self.inside = inside if inside is not None else before
        self.key_mask = key_mask
        self.row_mask = row_mask
        self.longest = longest
        self.share = share

    def constant(self, value):
        if isinstance(value, int) and not isinstance(value, bool):
            return self._whole_number(value)
        kind = "bool" if isinstance(value, bool) else "float"
        text = repr(value) if value == value and abs(value) != float("inf") else f'float("{value}")'
        return Value(text, kind=kind, level=UNARY if text.startswith("-") else ATOM)

    def symbol(self, name):
        return self.symbols[name]

    def call(self, operation, *args):
        value = self._call(operation, *args)
        shared = self.share and operation in (*FLOAT_FUNCTIONS, "tanh")
        if len(value.text) <= self.longest and not shared:
            return value
        lines = self.inside if "k" in value.axes else self.before
        return replace(value, text=lines.assign(operation if shared else "part", value.text), level=ATOM)

    def _call(self, operation, *args):
        if operation == "group":
            return args[0]
        found = bounds.TABLE[operation](*(TRUTH if arg.kind == "bool" else arg.bounds for arg in args))
        narrow = operation in WHOLE and all(arg.kind == "int" and not arg.wide for arg in args)
        if narrow and not found.joined(*(arg.bounds for arg in args)).within(INT32):
            # one int64 operand is enough: the others are promoted
            first = next(place for place, arg in enumerate(args) if not arg.literal)
            args = (*args[:first], self._widened(args[first]), *args[first + 1 :])
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
            return self._function(FUNCTIONS[operation], args, axes, number)
        if operation in FLOAT_FUNCTIONS:
            return self._function(operation, [self._float(arg) for arg in args], axes, "float")
        if operation == "tanh":
            return _called(self.tanh, [self._float(arg) for arg in args], axes, "float")
        if operation == "where":
            kind = "float" if any(arg.kind == "float" for arg in args[1:]) else args[1].kind
            return self._function("where", args, axes, kind)
        if operation == "is_power_of_two":
            return _called("_is_power_of_two", args, axes, "bool")
        if operation == "floordiv" and (first := _one_block(*args)) is not None:
            return self._call(operation, first, args[1])
        if operation in ("floordiv", "mod") and (shift := _exact_log2(args[1])) is not None:
            return _by_power_of_two(operation, args[0], shift, axes)
        if operation in HELPERS:
            return _called(HELPERS[operation], args, axes, number)
        raise UnknownOperation(f"the Triton target has no operation {operation!r}")

    def address(self, pointer: str, strides: str, name: str, indices, axes) -> tuple[str, list[str]]:
        """The address of an element of a tensor with the sizes of ``name``, and the masks under which it exists."""
        parts, masks = [pointer], []
        if "q" in axes and self.row_mask:
            masks.append(Value(self.row_mask, ROWS).spread(axes))
        if "k" in axes and self.key_mask:
            masks.append(Value(self.key_mask, KEYS).spread(axes))
        for dim, index in enumerate(indices):
            if index.text == "0":
                continue
            constant = index.text.isdigit()
            wide = index.text if constant else f"{index.at(ATOM)}.to({self.language}.int64)"
            parts.append(Value(f"{wide} * {strides}_stride_{dim}", index.axes, level=PRODUCT).spread(axes, SUM))
            if not (index.plain or constant):
                size = f"{name}_size_{dim}"
                inside = Value(f"({index.at(OR)} >= 0) & ({index.at(OR)} < {size})", index.axes, "bool", AND)
                masks.append(inside.spread(axes, ATOM))
        return " + ".join(parts), masks

    def load(self, name, indices):
        spec = self.captures[name]
        axes = frozenset().union(*(index.axes for index in indices)) if indices else SCALAR
        address, masks = self.address(f"data_{name}", name, name, indices, axes)
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        text = f"{self.language}.load({address}{mask})"
        kind = "float" if spec.dtype.startswith(("float", "bfloat")) else "int"
        if kind == "float":
            text += "" if spec.dtype == "float32" else f".to({self.language}.float32)"
        elif spec.dtype in SMALL_INTEGERS:
            text += f".to({self.language}.int32)"
        elif spec.dtype in UNSIGNED:
            text += f".to({self.language}.int64)"
        lines = self.inside if "k" in axes else self.before
        found = bounds.INTEGERS.get(spec.dtype, UNKNOWN)
        return Value(lines.assign(name, text), axes, kind, bounds=found, wide=kind == "int" and not found.within(INT32))

    def _function(self, name: str, args, axes, kind) -> Value:
        return _called(f"{self.language}.{name}", args, axes, kind)

    def _widened(self, value: Value) -> Value:
        """The value as int64."""
        text = f"{value.at(ATOM)}.to({self.language}.int64)"
        return value if value.wide else replace(value, text=text, level=ATOM, wide=True)

    def _whole_number(self, value: int) -> Value:
        found = Interval(value, value)
        if found.within(INT32):
            return Value(str(value), level=UNARY if value < 0 else ATOM, bounds=found)
        if not found.within(INT64):
            raise UnknownOperation(f"no kernel computes with {value}")
        return Value(self.int64.format(value), bounds=found, wide=True)

    def _float(self, value: Value) -> Value:
        if value.kind == "float":
            return value
        if value.as_float is not None:
            return value.as_float
        if value.literal:
            return self.constant(float(value.text))
        return Value(f"{value.at(ATOM)}.to({self.language}.float32)", value.axes, "float")


def all_symbols(indices: dict[str, Value], attention: AttentionSpec, wide: bool) -> dict[str, Value]:
    """Values of the given indices and score, and of lengths, scalars and numbers; ``wide``: of any size."""
    found = {"Nq": Value("q_len"), "Nk": Value("k_len"), **indices}
    found |= {name: Value(f"scalar_{name}") for name in attention.scalars}
    found |= {name: Value(f"number_{name}", kind="float") for name in attention.numbers}
    return {name: replace(value, bounds=FAR, tile=None) for name, value in found.items()} if wide else found


def tested_dims(load) -> list[int]:
    """Dimensions of a load whose index is computed, so that the kernel has to check its bounds."""
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


def _called(name: str, args, axes, kind) -> Value:
    return Value(f"{name}({', '.join(arg.spread(axes) for arg in args)})", axes, kind)


def _one_block(index: Value, divisor: Value) -> Value | None:
    """The first index of a tile that lies within one block of ``divisor``: the quotient is a scalar for the tile."""
    if index.tile is None or not divisor.text.isdigit() or int(divisor.text) % index.tile[1] or divisor.text == "0":
        return None
    return Value(index.tile[0])


def _exact_log2(divisor: Value) -> int | None:
    if not divisor.text.isdigit() or int(divisor.text) <= 0 or int(divisor.text) & (int(divisor.text) - 1):
        return None
    return int(divisor.text).bit_length() - 1


def _by_power_of_two(operation: str, value: Value, shift: int, axes) -> Value:
    """By shift or mask, which round down for negative numbers; Triton's ``//`` and ``%`` round towards zero."""
    if operation == "floordiv":
        return Value(f"({value.at(SHIFT)} >> {shift})", axes)
    return Value(f"({value.at(AND)} & {(1 << shift) - 1})", axes)
