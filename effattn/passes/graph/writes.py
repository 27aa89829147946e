"""Which memory a node writes: by the names of functions and methods, and by the schemas of operators."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from effattn.passes.graph.vocabulary import canonical, is_dead_dropout, named

_INPLACE_OPERATORS = {
    getattr(operator, f"i{name}")
    for name in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    ]
} | {operator.setitem}
# methods that change the shape or storage of the tensor object itself
CHANGES_ITSELF = {
    *("squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_"),
    *("as_strided_", "resize_", "resize_as_", "set_", "set_data"),
}
# packages whose functions have no side effects unless their names or schemas say so
_PURE_PACKAGES = ("torch", "_operator", "operator", "builtins", "math", "einops")


def writes(node: fx.Node) -> bool:
    """Whether running ``node`` writes memory that existed before."""
    return bool(written_args(node))


def written_args(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes."""
    if node.op == "call_method":
        return _nodes(node.args[:1]) if _method_writes(str(node.target)) else []
    return _function_writes(node.target)(node) if node.op == "call_function" else []


@lru_cache(maxsize=1024)
def _method_writes(name: str) -> bool:
    inplace = (name.endswith("_") and not name.endswith("__") and name != "requires_grad_") or name == "__setitem__"
    return inplace or (name.startswith("__i") and name.endswith("__") and name != "__invert__")


@lru_cache(maxsize=1024)
def _function_writes(target: Any) -> Callable[[fx.Node], list[fx.Node]]:
    """A function that returns the arguments written by a call of ``target``, cached per target."""
    if named(target) == "dropout":
        return _dropout_writes
    if (schemas := schemas_of(target)) is not None:
        written = any(_is_written(argument.alias_info) for schema in schemas for argument in schema.arguments)
        return partial(schema_args, schemas=schemas, wanted=_is_written) if written else _nothing
    if isinstance(target, torch._ops.HigherOrderOperator):
        return lambda node: _nodes([node.args, node.kwargs]) if _body_writes(node) else []
    if isinstance(target, FunctionType) and (target.__module__ or "").split(".")[0] not in _PURE_PACKAGES:
        return lambda node: _nodes([node.args, node.kwargs])  # made opaque by allow_in_graph: it may do anything
    return partial(_plain_writes, first=_writes_first(target), flag=_inplace_position(target))


def _nothing(node: fx.Node) -> list[fx.Node]:
    return []


def _dropout_writes(node: fx.Node) -> list[fx.Node]:
    call = canonical(node)
    if call is not None and is_dead_dropout(call):
        return []  # returns its input unchanged, even with inplace=True
    return _plain_writes(node, first=_writes_first(node.target), flag=_inplace_position(node.target))


def _writes_first(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    inplace = target in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    return (inplace and target not in (operator.and_, operator.or_)) or name in CHANGES_ITSELF


def _plain_writes(node: fx.Node, *, first: bool, flag: int | None) -> list[fx.Node]:
    """The arguments written by a function without a schema.

    ``flag``: the position of its parameter ``inplace``, as in ``F.relu(x, True)``. ``first``: it writes its first one.
    """
    found: list[fx.Node] = []
    if "inplace" in node.kwargs:
        first = first or node.kwargs["inplace"] is not False
    elif flag is not None and flag < len(node.args):
        first = first or node.args[flag] is not False
    if first:
        found += _nodes(node.args[:1] or [node.kwargs.get("input")])
    return found + _nodes([node.kwargs["out"]]) if "out" in node.kwargs else found


def _nodes(values: Any) -> list[fx.Node]:
    if all(isinstance(value, fx.Node) for value in values):
        return list(values)
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, fx.Node)]


def _inplace_position(target: Any) -> int | None:
    try:
        parameters = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def _body_writes(node: fx.Node) -> bool:
    """Whether a higher-order operator may write its arguments: a Triton kernel, or a body with in-place operations."""
    if "mutation" in str(node.target):
        return True
    return any(written_args(inner) for body in bodies_of(node) for inner in body.nodes)


def bodies_of(node: fx.Node) -> list[fx.Graph]:
    """The graphs that a higher-order operator runs, such as a checkpointed region; [] for any other node."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    module = node.graph.owning_module
    found = [getattr(module, str(arg.target), None) for arg in node.all_input_nodes if arg.op == "get_attr"]
    return [body.graph for body in found if isinstance(body, fx.GraphModule)]


def _is_written(info: Any) -> bool:
    return info is not None and info.is_write


def schemas_of(target: Any) -> list[Any] | None:
    """The schemas of ``target``; None if it is not an operator of torch's dispatcher."""
    if isinstance(target, torch._ops.OpOverload):
        return [target._schema]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return list(target._schemas.values())
    return None


def schema_args(node: fx.Node, schemas: list[Any], wanted: Callable[[Any], bool]) -> list[fx.Node]:
    found: list[fx.Node] = []
    for schema in schemas:
        for index, argument in enumerate(schema.arguments):
            if wanted(argument.alias_info):
                value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
                found += [item for item in _nodes([value]) if item not in found]
    return found
