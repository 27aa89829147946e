"""A read-only view of a Dynamo graph: order, shapes, who aliases whom, and when memory is written.

Dynamo's graphs mutate (``index_copy_`` into a cache, ``add_`` on a counter), so a value is a node *at a time*. The
view answers two questions that every later step asks: what does this node hold when it is read at that point, and is
it still the same further down?
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import defaultdict
from typing import Any

import sympy
import torch
from networkx.utils import UnionFind
from torch import fx

from effattn.passes.vocabulary import Call, canonical

# operations whose result may share memory with an argument
_VIEWS = set(
    ["reshape", "transpose", "permute", "movedim", "t", "getattr", "expand", "getitem", "select", "narrow", "chunk", "split", "unbind", "identity", "to", "type_as"]
) | {f"cast_{name}" for name in ["float32", "float64", "float16", "bfloat16", "int32", "int64", "bool"]}
_OTHER_VIEWS = set(
    ["diagonal", "as_strided", "view_as_real", "view_as_complex", "real", "imag", "unfold", "tensor_split", "hsplit", "vsplit", "dsplit", "squeeze_", "unsqueeze_", "detach_", "alias", "lift_fresh", "positive", "resolve_conj", "resolve_neg", "values", "indices", "hsplit", "t_", "transpose_"]
)
_INPLACE_OPERATORS = {
    getattr(operator, name)
    for name in ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift", "imatmul", "setitem"]
}


class GraphView:
    """Facts about one ``fx.Graph``; valid until the graph is changed."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.time: dict[fx.Node, int] = {node: index for index, node in enumerate(graph.nodes)}
        self._calls: dict[fx.Node, Call | None] = {}
        self._aliases: UnionFind = UnionFind(graph.nodes)
        self._writes: dict[Any, list[tuple[int, fx.Node, fx.Node]]] = defaultdict(list)
        self._find_aliases_and_writes()

    def call(self, node: Any) -> Call | None:
        """The node through the vocabulary."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._calls:
            self._calls[node] = canonical(node)
        return self._calls[node]

    # -- memory ---------------------------------------------------------------------------------------------

    def writes_between(self, node: fx.Node, start: int, end: int) -> list[fx.Node]:
        """Nodes at times in (start, end) that write memory which ``node`` may share."""
        found = self._writes.get(self._aliases[node], [])
        first = bisect_left(found, start + 1, key=lambda write: write[0])
        last = bisect_left(found, end, key=lambda write: write[0])
        return [writer for _, writer, _ in found[first:last]]

    def memory_of(self, node: fx.Node) -> fx.Node:
        """A representative of all nodes that may share memory with ``node``."""
        return self._aliases[node]

    def writes(self, node: fx.Node) -> bool:
        """Whether running ``node`` writes memory that existed before."""
        return bool(_written_args(node))

    def written_as(self, writer: fx.Node) -> fx.Node | None:
        """The node that ``writer`` was given to write to."""
        targets = _written_args(writer)
        return targets[0] if len(targets) == 1 else None

    def _find_aliases_and_writes(self) -> None:
        written: list[tuple[int, fx.Node, fx.Node]] = []
        for node, index in self.time.items():
            for source in self._shared_with(node):
                self._aliases.union(source, node)
            for target in _written_args(node):
                self._aliases.union(target, node)
                written.append((index, node, target))
        for index, node, target in written:
            self._writes[self._aliases[target]].append((index, node, target))

    def _shared_with(self, node: fx.Node) -> list[fx.Node]:
        if node.op not in ("call_function", "call_method"):
            return []
        call = self.call(node)
        if call is not None:
            source = call.get("input")
            return [source] if call.name in _VIEWS and isinstance(source, fx.Node) else []
        if isinstance(node.target, torch._ops.OpOverload):
            return _schema_args(node, lambda info: info is not None)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in _OTHER_VIEWS and node.args and isinstance(node.args[0], fx.Node):
            return [node.args[0]]
        return []

    # -- shapes and dtypes ----------------------------------------------------------------------------------

    @staticmethod
    def value(node: Any) -> Any:
        """The fake tensor or number that Dynamo recorded for a node; anything else is its own value."""
        return node.meta.get("example_value") if isinstance(node, fx.Node) else node

    def tensor(self, node: Any) -> torch.Tensor | None:
        value = self.value(node)
        return value if isinstance(value, torch.Tensor) else None

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """The sizes of a tensor node as sympy terms (symbolic lengths stay symbolic; no guard is made)."""
        tensor = self.tensor(node)
        return tuple(as_sympy(size) for size in tensor.shape) if tensor is not None else ()


def as_sympy(value: Any) -> sympy.Expr:
    """An int or SymInt as a sympy term, without guarding on it."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return sympy.sympify(value)


def hint(value: Any) -> int:
    """An int for costs and stages: the size that was seen while tracing."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        found = value.node.hint
        return int(found) if found is not None else 0
    return int(value)


def _written_args(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory a node writes."""
    if node.op == "call_method":
        name = str(node.target)
        inplace = (name.endswith("_") and not name.endswith("__") and name != "requires_grad_") or name == "__setitem__"
        inplace = inplace or (name.startswith("__i") and name.endswith("__") and name != "__invert__")
        return [node.args[0]] if inplace and node.args and isinstance(node.args[0], fx.Node) else []
    if node.op != "call_function":
        return []
    found: list[fx.Node] = []
    if isinstance(node.target, torch._ops.OpOverload):
        return _schema_args(node, lambda info: info is not None and info.is_write)
    name = getattr(node.target, "__name__", "")
    writes_first = node.target in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    writes_first = writes_first or node.kwargs.get("inplace") is True
    if writes_first and node.args:
        first = node.args[0]
        found += [
            item for item in (first if isinstance(first, (list, tuple)) else [first]) if isinstance(item, fx.Node)
        ]
    out = node.kwargs.get("out")
    found += [item for item in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(item, fx.Node)]
    return found


def _schema_args(node: fx.Node, wanted) -> list[fx.Node]:
    found: list[fx.Node] = []
    for index, argument in enumerate(node.target._schema.arguments):
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if wanted(argument.alias_info):
            found += [
                item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, fx.Node)
            ]
    return found
