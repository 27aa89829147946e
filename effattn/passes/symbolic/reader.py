"""The reader: from a node to an expression in its indices, aware of writes to memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.view import GraphView, as_sympy
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.index_bounds import IndexBounds

Kind = Literal["bool", "int", "float"]
Index = tuple[sympy.Expr, ...]
MAX_WRITES = 2  # a tensor with more partial writes becomes a captured tensor
MAX_OPERATIONS = 2000  # of an expression as a tree; a larger one becomes a captured tensor
MAX_INDEX = 100  # the same for the index of an element
INDEX_COST = 10  # cost of simplifying an operation in an index, relative to one in a value
MAX_WORK = 50_000  # operations read for one element; what takes more becomes a captured tensor


@dataclass(frozen=True)
class Reading:
    """A tensor as a function of its indices: ``at((i0, i1, ...))`` is a sympy number, or a boolean for kind "bool"."""

    shape: tuple[sympy.Expr, ...]
    kind: Kind
    at: Callable[[Index], Any]

    def number_at(self, index: Index):
        value = self.at(index)
        return expr.Where(value, 1, 0) if self.kind == "bool" else value

    def bool_at(self, index: Index):
        value = self.at(index)
        return value if self.kind == "bool" else expr.nonzero(value)


@dataclass(frozen=True)
class CaptureSource:
    """The tensor of a named load: a node, and the time at which user code reads it."""

    node: fx.Node
    time: int


Handler = Callable[["Reader", Call, tuple[sympy.Expr, ...]], "Reading | None"]
HANDLERS: dict[str, Handler] = {}


def reads(*names: str) -> Callable[[Handler], Handler]:
    """Register the reader of these operations. It may return None: the node then becomes a captured tensor."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def generic_index(rank: int) -> Index:
    """Index symbols known only to be nonnegative."""
    return tuple(sympy.Symbol(f"i{axis}", integer=True, nonnegative=True) for axis in range(rank))


def kind_of(dtype: torch.dtype) -> Kind:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


class Reader(IndexBounds):
    """Reads nodes of one graph as expressions.

    ``sizes`` maps index symbols to exclusive upper bounds, by which views simplify. With ``products``, a product of two
    tensors becomes a load named ``raw_...``, since it may be query . key.
    """

    everything = False  # True in a score_mod or mask_mod, where an unreadable node is an error

    def __init__(self, view: GraphView, sizes: dict[sympy.Symbol, sympy.Expr] | None = None, *, products: bool = False):
        super().__init__(sizes)
        self.view = view
        self.products = products
        self.raw: dict[str, Contraction] = {}
        self.captures: dict[str, CaptureSource] = {}
        self.numbers: dict[str, fx.Node] = {}
        self.probed: dict[sympy.Symbol, sympy.Expr] = {}  # like ``sizes``, while a node is read for the first time
        self.reasons: dict[fx.Node, str] = {}  # why a node with a known operation became a captured tensor
        self._definitions: dict[fx.Node, Reading | None] = {}
        self._parts: dict[tuple[fx.Node, fx.Node], Reading | None] = {}  # by tensor and last writer
        self._work = 0  # operations read so far for the current element
        self._sizes: dict[int, tuple[Any, int]] = {}  # tree sizes of terms, by id: terms share most parts
        self._capture_names: dict[tuple[fx.Node, int], str] = {}

    def read(self, value: Any, time: int) -> Reading:
        """The value of ``value`` (a node or a Python number) when a node at ``time`` reads it."""
        if not isinstance(value, fx.Node):
            return _constant(value)
        held = self.view.value(value)
        if not isinstance(held, torch.Tensor):
            return self._number(value, held)
        if self.view.changes_itself(value):
            raise Unreadable(f"the shape or memory of {value.name} is changed in place")
        if self.view.cuts_gradient(value, time):
            return self._load(value, time)
        writers = self.view.writes_between(value, self.view.time[value], time)
        if writers:
            last = writers[-1]
            call = self.view.call(last)
            whole = call is not None and call.name != "setitem"
            if self.view.written_as(last) is value and last is not value and whole:
                return self.read(last, time)  # x.masked_fill_(...) and then x: the result of the write
            few = len(writers) <= MAX_WRITES or self._was_product(value)
            return (self._written_in_part(value, last) if few else None) or self._load(value, time)
        if value not in self._definitions:
            self._definitions[value] = self._define(value)
        return self._definitions[value] or self._load(value, time)

    def argument(self, call: Call, name: str, default: Any = None) -> Reading:
        """An argument of a call, at the time of the call."""
        return self.read(call.get(name, default), self.view.time[call.node])

    def extent(self, value: Any) -> sympy.Expr:
        """An integer argument (int or SymInt) as a term."""
        return as_sympy(self.view.value(value))

    def as_data(self, node: fx.Node, time: int) -> Reading:
        """The node as a captured tensor, without reading its definition."""
        return self._load(node, time)

    def _was_product(self, value: fx.Node) -> bool:
        """Whether a tensor held a product of query and key before it was written."""
        reading = self.read(value, self.view.time[value] + 1)
        loads = expr.loads_of(reading.at(generic_index(len(reading.shape))))
        return any(load.name in self.raw for load in loads)

    def _written_in_part(self, value: fx.Node, writer: fx.Node) -> Reading | None:
        if (value, writer) not in self._parts:
            call = Call("written", writer, {"input": value})
            found = HANDLERS[call.name](self, call, self.view.shape(value))
            self._parts[value, writer] = self._readable(value, found)
        return self._parts[value, writer]

    def _define(self, node: fx.Node) -> Reading | None:
        call = self.view.call(node)
        if self.products and call is not None and (product := contraction(self.view, node)) is not None:
            return self._product(call, product)
        handler = HANDLERS.get(call.name) if call is not None else None
        if call is None or handler is None:
            return None
        return self._readable(node, handler(self, call, self.view.shape(node)))

    def _readable(self, node: fx.Node, reading: Reading | None) -> Reading | None:
        """The reading with its elements cached; None if the node has to become a captured tensor."""
        if reading is None:
            return None
        reading = Reading(reading.shape, reading.kind, self._bounded(node, reading.at))
        outside, generic = self.probed, generic_index(len(reading.shape))
        self.probed = dict(zip(generic, reading.shape, strict=True))
        try:
            reading.at(generic)
        except Unreadable as unreadable:
            self.reasons[node] = str(unreadable)
            return None
        finally:
            self.probed = outside
        return reading

    def _bounded(self, node: fx.Node, at: Callable[[Index], Any]) -> Callable[[Index], Any]:
        """``at`` with a cache and a limit on its work: graphs share values, but expressions repeat them."""
        known: dict[Index, Any] = {}

        def bounded(index: Index):
            index = tuple(index)
            if index not in known:
                outermost = self._work == 0
                try:
                    self._work += 1 + INDEX_COST * sum(self._size(node, entry, MAX_INDEX) for entry in index)
                    value = at(index)
                    self._work += self._size(node, value, MAX_OPERATIONS)
                    if self._work > MAX_WORK:
                        raise Unreadable(f"{node.name} takes more than {MAX_WORK} operations to read")
                finally:
                    if outermost:
                        self._work = 0
                known[index] = value
            return known[index]

        return bounded

    def _size(self, node: fx.Node, term: Any, most: int) -> int:
        if (size := expr.tree_size(term, self._sizes)) > most:
            raise Unreadable(f"{node.name} has more than {most} operations")
        return size

    def _product(self, call: Call, product: Contraction) -> Reading:
        name = f"raw_{call.node.name}"
        self.raw[name] = product
        shape = self.view.shape(call.node)

        def raw(index: Index):
            return expr.load(name, index, integer=False)

        if call.name != "baddbmm":
            return Reading(shape, "float", raw)
        added = self.argument(call, "input")
        skip = len(shape) - len(added.shape)
        beta, alpha = (self.argument(call, scale, 1).at(()) for scale in ("beta", "alpha"))

        def at(index: Index):
            inside = (
                sympy.Integer(0) if n == 1 and full != 1 else i
                for n, i, full in zip(added.shape, index[skip:], shape[skip:], strict=True)
            )
            return alpha * raw(index) + (beta * self.grouped(added.at(tuple(inside))) if beta != 0 else 0)

        return Reading(shape, "float", at)

    def _number(self, node: fx.Node, held: Any) -> Reading:
        if isinstance(held, (int, torch.SymInt)) and not isinstance(held, bool):
            return Reading((), "int", lambda index: as_sympy(held))
        if isinstance(held, (float, bool)):
            return _constant(held)
        if not isinstance(held, torch.SymFloat):
            raise Unreadable(f"cannot read {node.name} ({type(held).__name__}) as a number")
        name = _identifier(node.name)
        self.numbers[name] = node
        return Reading((), "float", lambda index: expr.number(name))

    def _load(self, node: fx.Node, time: int) -> Reading:
        tensor = self.view.tensor(node)
        assert tensor is not None
        version = len(self.view.writes_between(node, -1, time))
        name = self._capture_names.get((node, version))
        if name is None:
            name = _identifier(node.name)
            while name in self.captures or name in self.raw:
                name += f"_at_{time}"
            self._capture_names[node, version] = name
            self.captures[name] = CaptureSource(node, time)
        kind = kind_of(tensor.dtype)
        shape = self.view.shape(node)
        if tensor.dtype == torch.uint64:
            raise Unreadable(f"{node.name} may overflow int64")

        def at(index: Index):
            # the index of a dimension of size 1 is 0; b and h are kept, so that B = 1 and H = 1 read like other sizes
            whole = (expr.b, expr.h)
            inside = tuple(
                sympy.Integer(0) if size == 1 and i not in whole else i for size, i in zip(shape, index, strict=True)
            )
            element = expr.load(name, inside, integer=kind != "float")
            return sympy.Ne(element, 0) if kind == "bool" else element

        return Reading(shape, kind, at)

    def dtype_of_capture(self, name: str) -> torch.dtype | None:
        """The dtype of a captured tensor; None for a product of query and key."""
        source = self.captures.get(name)
        return None if source is None else self.view.held(source.node).dtype

    def computes_in(self, dtype: torch.dtype, *values: Any) -> torch.dtype:
        """The dtype in which user code computes with ``values``, where the graph says ``dtype``."""
        return dtype

    def grouped(self, value):
        """Protect a sum in floating-point arithmetic by :class:`effattn.ir.expr.Group`.

        Sums that contain a mask or a product of query and key are not grouped.
        """
        if not isinstance(value, sympy.Add):
            return value
        if value.xreplace({load: sympy.Integer(0) for load in expr.loads_of(value)}).has(expr.Where, expr.s):
            return value
        return value if any(load.name in self.raw for load in expr.loads_of(value)) else expr.Group(value)


def _constant(value: Any) -> Reading:
    if isinstance(value, bool):
        truth = sympy.true if value else sympy.false
        return Reading((), "bool", lambda index: truth)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return Reading((), "int" if isinstance(value, torch.SymInt) else "float", lambda index: as_sympy(value))
    if not isinstance(value, (int, float)):
        raise Unreadable(f"cannot read {type(value).__name__} as a number")
    number = sympy.sympify(value)
    if number is sympy.nan:
        raise Unreadable("NaN in a mask or score")
    return Reading((), "int" if isinstance(value, int) else "float", lambda index: number)


class Unreadable(Exception):
    """The value cannot be read as an expression; the message says why."""


def _identifier(name: str) -> str:
    return name if name.isidentifier() else "x_" + "".join(c if c.isalnum() else "_" for c in name)
