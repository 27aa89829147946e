"""A read-only view of a Dynamo graph: order, shapes, aliases, and writes to memory.

Dynamo's graphs mutate (``index_copy_`` into a cache, ``add_`` on a counter), so a value is a node *at a time*. The view
says what a node holds at a given point, and whether that changes later.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy
import torch
from networkx.utils import UnionFind
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call, canonical
from effattn.passes.graph.writes import CHANGES_ITSELF, schema_args, schemas_of, writes, written_args

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint  # the node that torch.utils.checkpoint becomes

# operations whose result may share memory with an argument; used only where Dynamo recorded no value
_VIEWS = {f"cast_{name}" for name in ("float32", "float64", "float16", "bfloat16", "int32", "int64", "bool")} | {
    *("reshape", "transpose", "permute", "movedim", "t", "getattr", "expand", "getitem", "select", "narrow", "chunk"),
    *("split", "unbind", "identity", "to", "type_as", "dropout"),
}
_MAKERS = ("arange", "ones", "zeros", "full", "tensor")  # read at most the shape of an argument
_LIKE_ANOTHER = ("type_as", "reshape", "expand")  # read at most the dtype or shape of the second argument


class GraphView:
    """Facts about one ``fx.Graph``; invalid once the graph changes."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.time: dict[fx.Node, int] = {node: index for index, node in enumerate(graph.nodes)}
        self._calls: dict[fx.Node, Call | None] = {}
        self._shapes: dict[fx.Node, tuple[sympy.Expr, ...]] = {}
        self._aliases: UnionFind = UnionFind(graph.nodes)
        self._writes: dict[Any, list[tuple[int, fx.Node, fx.Node]]] = defaultdict(list)
        self._find_aliases_and_writes()
        self._gradient_switches = [
            (index, bool(node.args[0]))
            for node, index in self.time.items()
            if node.op == "call_function" and node.target is torch._C._set_grad_enabled
        ]

    def call(self, node: Any) -> Call | None:
        """The node in the vocabulary's terms, or None."""
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
        return writes(node)

    def written_as(self, writer: fx.Node) -> fx.Node | None:
        """The node passed to ``writer`` as the tensor to write; None if there are several."""
        targets = written_args(writer)
        return targets[0] if len(targets) == 1 else None

    def changes_itself(self, node: fx.Node) -> bool:
        """Whether a tensor that shares memory with ``node`` changes its shape in place. Its values are then unknown."""
        return self._aliases[node] in self._reshaped

    def _find_aliases_and_writes(self) -> None:
        written: list[tuple[int, fx.Node, fx.Node]] = []
        storages: dict[int, fx.Node] = {}
        for node, index in self.time.items():
            known = self._storages(node)
            for storage in known or ():
                if (first := storages.setdefault(storage, node)) is not node:
                    self._aliases.union(first, node)
            for source in self._shared_with(node) if known is None else ():
                self._aliases.union(source, node)
            for target in written_args(node):
                self._aliases.union(target, node)
                written.append((index, node, target))
        for index, node, target in written:
            self._writes[self._aliases[target]].append((index, node, target))
        calls = (node for node in self.time if node.op.startswith("call"))
        changed = [node for node in calls if str(getattr(node.target, "__name__", node.target)) in CHANGES_ITSELF]
        self._reshaped = {self._aliases[target] for node in changed for target in node.all_input_nodes[:1]}

    def _storages(self, node: fx.Node) -> list[int] | None:
        """Storages of the fake tensors that Dynamo recorded. Views share them, and so do overlapping inputs."""
        found = []
        held = node.meta.get("example_value")
        for value in (held,) if isinstance(held, torch.Tensor) else pytree.tree_leaves(held):
            if isinstance(value, torch.Tensor):
                try:
                    found.append(value.untyped_storage()._cdata)
                except (NotImplementedError, RuntimeError):
                    return None
        return found or None

    def _shared_with(self, node: fx.Node) -> list[fx.Node]:
        if node.op not in ("call_function", "call_method"):
            return []
        call = self.call(node)
        if call is not None:
            source = call.get("input")
            return [source] if call.name in _VIEWS and isinstance(source, fx.Node) else []
        if (schemas := schemas_of(node.target)) is not None:
            return schema_args(node, schemas, lambda info: info is not None)
        return [source for source in node.all_input_nodes if self.tensor(source) is not None]

    # -- gradients ------------------------------------------------------------------------------------------

    def gradient_flows(self, time: int) -> bool:
        """Whether gradient mode is on at ``time``."""
        place = bisect_left(self._gradient_switches, time, key=lambda switch: switch[0])
        return self._gradient_switches[place - 1][1] if place else torch.is_grad_enabled()

    def cuts_gradient(self, node: fx.Node, time: int) -> bool:
        """Whether no gradient flows through ``node`` to its inputs for a reader at ``time``, as after ``detach()``."""
        value = self.tensor(node)
        if value is None or value.requires_grad or not value.is_floating_point() or not self.gradient_flows(time):
            return False
        call = self.call(node)
        if call is not None and call.name in _MAKERS:
            return False
        sources = [call.get("input")] if call is not None and call.name in _LIKE_ANOTHER else node.all_input_nodes
        inputs = (self.tensor(source) for source in sources)
        return any(source is not None and source.requires_grad for source in inputs)

    # -- shapes and dtypes ----------------------------------------------------------------------------------

    @staticmethod
    def value(node: Any) -> Any:
        """The fake tensor or number that Dynamo recorded for a node; any other argument is returned as it is."""
        return node.meta.get("example_value") if isinstance(node, fx.Node) else node

    def tensor(self, node: Any) -> torch.Tensor | None:
        value = self.value(node)
        return value if isinstance(value, torch.Tensor) else None

    def held(self, node: Any) -> torch.Tensor:
        """The fake tensor of a node that is known to have one."""
        tensor = self.tensor(node)
        assert tensor is not None, f"{node} holds no tensor"
        return tensor

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """Sizes of a tensor node as sympy terms; symbolic lengths stay symbolic and add no guard."""
        if (known := self._shapes.get(node)) is None:
            tensor = self.tensor(node)
            known = tuple(as_sympy(size) for size in tensor.shape) if tensor is not None else ()
            self._shapes[node] = known
        return known


def as_sympy(value: Any) -> sympy.Expr:
    """An int or SymInt as a sympy term in effattn's functions, without a guard."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        term = value.node.expr
        return _in_our_words(_settled(term, value.node.shape_env) if term.has(*_CHOICES) else term)
    return sympy.Integer(value) if type(value) is int else sympy.sympify(value)


_CHOICES: dict[type, Callable[[Any, Any], Any]] = {functions.Min: operator.le, functions.Max: operator.ge}


def _settled(term: sympy.Expr, env: ShapeEnv) -> sympy.Expr:
    """A size in which each Min and Max is replaced by one of its arguments, if Dynamo's guards decide which."""
    args = [_settled(arg, env) for arg in term.args]
    if (wins := _CHOICES.get(type(term))) is not None:
        for one in args:
            if all(one == other or known(env, wins(one, other)) for other in args):
                return one
    return term.func(*args) if args else term


def known(env: ShapeEnv, condition: Any) -> bool:
    """Whether a condition in torch's own symbolic functions holds in every call that the graph serves."""
    if condition in (sympy.true, sympy.false):
        return condition == sympy.true
    return statically_known_true(env.create_symboolnode(condition))


# torch's symbolic functions -> effattn's; equivalent for sizes, whose terms are positive
_OUR_WORDS: dict[type, Any] = {
    functions.FloorDiv: expr.FloorDiv,
    functions.CleanDiv: expr.FloorDiv,
    functions.Mod: expr.Modulo,
    functions.PythonMod: expr.Modulo,
    functions.Max: sympy.Max,
    functions.Min: sympy.Min,
}


@lru_cache(maxsize=4096)
def _in_our_words(term: sympy.Expr) -> sympy.Expr:
    if not term.args:
        return term
    args = [_in_our_words(arg) for arg in term.args]
    ours = _OUR_WORDS.get(type(term))
    if ours in (expr.FloorDiv, expr.Modulo) and not (args[1].is_Integer and args[1] > 0):
        return term
    return term.func(*args) if ours is None else ours(*args)


def hint(value: Any) -> int:
    """An int for costs and stages: for a symbolic size, its value while tracing."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        found = value.node.hint
        return int(found) if found is not None else 0
    return int(value)
