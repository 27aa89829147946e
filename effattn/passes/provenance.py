"""Where in the user's model a node comes from: its module and the line of code, from what Dynamo recorded."""

from __future__ import annotations

import os
import re

import torch
from torch import fx

_TORCH = os.path.dirname(torch.__file__)


def module_path(node: fx.Node) -> tuple[str, tuple[str, ...]]:
    """(dotted path of the innermost module, class names outermost first) from what Dynamo recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return "", ()
    path = str(entries[-1][0])
    path = re.sub(r"getattr\((.*?), '(\w+)'\)", r"\1.\2", path)
    path = re.sub(r"\['(\w+)'\]", r".\1", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    path = re.sub(r"(_modules|_parameters)\.", "", path)
    path = re.sub(r"^L\.?(self\.?)?", "", path).strip(".")
    classes = tuple(getattr(entry[1], "__name__", str(entry[1]).rsplit(".", 1)[-1]) for entry in entries)
    return path, classes


def class_of_self() -> tuple[str, ...]:
    """The class of the module that is compiled: what Dynamo records of nodes begins below it. (): it is unknown."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # takes a second to import

    try:
        owner = InstructionTranslator.current_tx().f_locals.get("self")
    except AttributeError:  # nothing is being compiled, or Dynamo keeps it elsewhere
        return ()
    return (type(owner).__name__,) if isinstance(owner, torch.nn.Module) else ()


def layer_of(path: str) -> int | None:
    """The number in a module's path that counts layers: the last one."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[-1]) if numbers else None


def location(node: fx.Node) -> str:
    """file:line of the user's code that made the node."""
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""
