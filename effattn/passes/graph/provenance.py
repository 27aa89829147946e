"""Where a node comes from in the user's model: module and line of code, as Dynamo recorded them."""

from __future__ import annotations

import os
import re
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from effattn.passes.graph.vocabulary import canonical

TORCH = os.path.join(os.path.dirname(torch.__file__), "")  # the separator excludes torchvision


# the variable before the first module in a source, and accesses to it: L['args'][0], L['self']
_ROOT = re.compile(r"[LG]\['([^']*)'\](?:\.__closure__|\.cell_contents|\.__self__|\.__func__|\[[^\]]*\])*\.?")
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_modules|_parameters)(?=\.|$)"
)


def module_path(node: fx.Node) -> str:
    """Path of the module that computes a node, as in ``named_modules()`` of the compiled module.

    For example ``decoder.layers.3.self_attn``. A graph that begins inside a module, after a graph break or where layers
    are compiled one by one, has paths that begin at that module; it may serve several layers. If a function calls
    several modules, their paths begin with the function's names for them.
    """
    entries = _entries(node)
    while entries and _is_activation(entries[-1][1]):
        entries.pop()
    if not entries:
        return ""
    source = str(entries[-1][0])
    path = clean(source)
    name = _variable(source)
    return f"{name}.{path}".strip(".") if name in _prefixes(node.graph) else path


def clean(source: str) -> str:
    """The path in a Dynamo source: ``L['self'].layers[3].attn`` gives ``layers.3.attn``."""
    while "getattr(" in source:
        source, before = re.sub(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", source), source
        if source == before:
            break
    path = _ROOT.sub("", source, count=1)
    path = re.sub(r"\['([^']*)'\]|\[(\d+)\]", r".\1\2", path)
    while (shorter := _WRAPPERS.sub("", path)) != path:
        path = shorter
    return path.strip(".")


def _variable(source: str) -> str:
    """A function's name for the outermost module in a source: ``encoder``, ``models.0``."""
    root = _ROOT.search(source)
    return ".".join(re.findall(r"\['?([^'\]]*)'?\]", root[0])) if root else ""


_names: WeakKeyDictionary[fx.Graph, frozenset[str]] = WeakKeyDictionary()


def _prefixes(graph: fx.Graph) -> frozenset[str]:
    """Names of the outermost modules, if the graph calls several."""
    if graph not in _names:
        outermost = {str(entries[0][0]) for node in graph.nodes if (entries := _entries(node))}
        names = frozenset(map(_variable, outermost))
        _names[graph] = names - {"self"} if len(names) > 1 else frozenset()
    return _names[graph]


def _entries(node: fx.Node) -> list[Any]:
    return list((node.meta.get("nn_module_stack") or {}).values())


def _is_activation(kind: Any) -> bool:
    """Whether a module is only a function, such as nn.Softmax. Its nodes belong to the module around it."""
    module = kind.__module__ if isinstance(kind, type) else str(kind)
    return "torch.nn.modules.activation" in module and "MultiheadAttention" not in str(kind)


def source_of(node: fx.Node) -> str:
    """Dynamo's source of a graph input: ``L['self']._buffers['mask']``; "" if it has none."""
    source = getattr(node, "_dynamo_source", None)
    return "" if source is None else str(source.name() if callable(source.name) else source.name)


def own_name(node: fx.Node) -> str:
    """User code's name of a tensor: the argument, attribute or variable that holds it; "" if it has none."""
    if node.op == "placeholder":
        source = source_of(node)
        name = (clean(source) or _variable(source)).rsplit(".", 1)[-1]
    else:
        name = re.sub(r"_\d+$", "", node.name)  # Dynamo names a node after the variable that it is assigned to
        operation = str(getattr(node.target, "__name__", node.target)).strip("_")
        name = "" if name.strip("_") == operation else name
    return name if name.isidentifier() and not name.startswith("__") else ""


def user_name(node: fx.Node) -> str:
    """User code's name of a tensor, or the node's name if it has none."""
    return own_name(node) or node.name


def is_state(node: fx.Node) -> bool:
    """Whether a graph input is a parameter or buffer."""
    if isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return True
    return any(part in source_of(node) for part in ("_parameters[", "_buffers["))


def layer_of(path: str) -> int | None:
    """The layer index in a module path: its last number."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[-1]) if numbers else None


def location(node: fx.Node) -> str:
    """file:line of the user code that made the node."""
    file, line, _ = _frame(node)
    return f"{file}:{line}" if file else ""


def code_line(node: fx.Node) -> str:
    """The user code that made the node, as "file:line: code"; "" if unknown."""
    file, line, code = _frame(node)
    return f"{file}:{line}: {code}" if file else ""


def _frame(node: fx.Node) -> tuple[str, str, str]:
    """(file, line, code) of the innermost frame outside torch."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "(.+?)", line (\d+)[^\n]*(?:\n[ \t]+(?!File ")(.*))?', trace)
    own = [frame for frame in frames if not frame[0].startswith(TORCH)] or frames
    return own[-1] if own else ("", "", "")


_SYMBOLS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "truediv": "/",
    "floordiv": "//",
    "mod": "%",
    "pow": "**",
    "matmul": "@",
    "iadd": "+=",
    "isub": "-=",
    "imul": "*=",
    "itruediv": "/=",
    "neg": "-",
    "and_": "&",
    "or_": "|",
    "invert": "~",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
    "getitem": "[...]",
    "setitem": "[...] =",
}


def spelled(node: fx.Node) -> str:
    """An operation as user code writes it: ``softmax``, ``+``, ``mT``; "the end of the graph" for the output node."""
    if node.op == "output":
        return "the end of the graph"
    if (call := canonical(node)) is not None and call.name == "getattr":
        return str(call.get("name"))
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    is_operator = getattr(node.target, "__module__", "") == "_operator"
    return f"'{_SYMBOLS[name]}'" if is_operator and name in _SYMBOLS else name
