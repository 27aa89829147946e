"""Classes of the modules around a node, from Dynamo's records and the frame it compiles.

Dynamo records the modules called inside the frame, but not the module whose ``forward`` is the frame. That module need
not be named ``self``: decorators such as those of transformers take ``*args``. Modules that called the frame are
ignored, because no guard would notice a different caller.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import fx

from effattn.versions import graph_being_made

_PART = re.compile(r"\.(\w+)|\['([^']*)'\]|\[(\d+)\]")


class _Frame(NamedTuple):
    """The outermost frame being compiled, not one inlined into it."""

    code: CodeType
    variables: Mapping[str, Mapping[str, Any]]  # L: locals of the function, G: globals of its Python module


_owners: WeakKeyDictionary[fx.Graph, str | None] = WeakKeyDictionary()  # a graph has one frame and many sites


def classes_around(node: fx.Node) -> tuple[str, ...]:
    """Class names of the modules around a node, from the compiled module inwards."""
    frame = _compiled_frame()
    found: dict[str, None] = {}
    if frame is not None:
        if node.graph not in _owners:
            _owners[node.graph] = _owner(frame)
        if (owner := _owners[node.graph]) is not None:
            found[owner] = None
    for source, kind in _recorded(node):
        for _, module in _along(source, frame):
            if isinstance(module, torch.nn.Module):
                found[type(module).__name__] = None
        found[getattr(kind, "__name__", str(kind).rsplit(".", 1)[-1])] = None
    return tuple(found)


def layer_around(node: fx.Node) -> tuple[int, int] | None:
    """(index, count) of the layer that contains a node; None if no module around it is one of several layers.

    A layer is the innermost module in a container with other modules of its class. The numbered parts of one layer
    (T5's attention, cross-attention and MLP) have different classes.
    """
    frame = _compiled_frame()
    for source, _ in reversed(_recorded(node)):
        steps = [("", None), *_along(source, frame)]
        for (_, container), (name, module) in reversed(list(itertools.pairwise(steps))):
            beside = _numbered(container)
            if name in beside and sum(type(one) is type(module) for one in beside.values()) > 1:
                return int(name), len(beside)
    return None


def _numbered(container: Any) -> dict[str, torch.nn.Module]:
    """The modules in a container, by number."""
    if isinstance(container, torch.nn.Module):
        container = container._modules
    if not isinstance(container, Mapping):
        container = dict(enumerate(container)) if isinstance(container, (list, tuple)) else {}
    named = {str(name): one for name, one in container.items()}
    return {name: one for name, one in named.items() if name.isdecimal() and isinstance(one, torch.nn.Module)}


def _recorded(node: fx.Node) -> list[tuple[str, Any]]:
    """(source, class) of each module around a node as Dynamo recorded it, outermost first."""
    return [(str(source), kind) for source, kind in (node.meta.get("nn_module_stack") or {}).values()]


def _compiled_frame() -> _Frame | None:
    if (made := graph_being_made()) is None:
        return None
    frame = made.root_tx
    return _Frame(frame.f_code, {"L": frame.f_locals, "G": frame.f_globals})


def _owner(frame: _Frame) -> str | None:
    """The class that the compiled frame is a method of, decorated or not, also if it resumes after a graph break."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import GetItemSource, LocalSource, Source

    for name, value in frame.variables["L"].items():
        source: Source = LocalSource(name, is_input=True)
        if isinstance(value, tuple) and value:  # *args of a decorator
            source, value = GetItemSource(source, 0), value[0]
        if isinstance(value, torch.nn.Module) and any(_within(frame.code, method) for method in _methods(value)):
            # without this guard, a method that never reads its module would also serve classes that inherit it
            install_guard(source.make_guard(GuardBuilder.TYPE_MATCH))
            return type(value).__name__
    return None


def _methods(module: torch.nn.Module) -> Iterator[CodeType]:
    """Code of the methods of a module's class, of its own ``forward``, and of what they wrap."""
    methods: list[Any] = [vars(module).get("forward")]
    for base in type(module).__mro__:
        methods += vars(base).values() if base is not torch.nn.Module else ()
    while methods:
        method = methods.pop()
        if isinstance(code := getattr(method, "__code__", None), CodeType):
            yield code
        inner = [getattr(method, name, None) for name in ("__wrapped__", "__func__")]
        methods += [one for one in inner if one is not None]
        if isinstance(method, functools.partial):
            methods.append(method.func)


def _within(code: CodeType, method: CodeType) -> bool:
    """Whether ``code`` lies in ``method``, by line: Dynamo's resume functions are new code that starts at the break."""
    if code.co_filename != method.co_filename or code.co_firstlineno < method.co_firstlineno:
        return False
    return code.co_firstlineno <= max(line or 0 for _, _, line in method.co_lines())


def _along(source: str, frame: _Frame | None) -> Iterator[tuple[str, Any]]:
    """(name, value) of each step from a module in a variable of the frame to ``source``: ``L['self'].layers[0]``."""
    while source != (source := re.sub(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", source)):
        pass
    inside = False
    value: Any = frame.variables.get(source[:1]) if frame is not None else None
    for part in _PART.finditer(source):
        name = part[part.lastindex or 0]
        value = _part_of(value, name)
        if inside := inside or isinstance(value, torch.nn.Module):
            yield name, value


def _part_of(value: Any, name: str) -> Any:
    if isinstance(value, torch.nn.Module) and name in value._modules:
        return value._modules[name]
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, (list, tuple)) and name.isdigit():
        return value[int(name)] if int(name) < len(value) else None
    return getattr(value, name, None)
