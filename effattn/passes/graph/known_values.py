"""Values of nodes that are known while compiling: what can be computed from the tensors that Dynamo was called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from effattn.passes.graph.view import GraphView, hint
from effattn.passes.graph.vocabulary import canonical


class Unknown(Exception):
    """A value that cannot be had while compiling; the message says why."""


class Known:
    """Reads values through views and arithmetic down to buffers. They may be others when the graph runs."""

    def __init__(self, view: GraphView, inputs: Sequence[Any]):
        self.view = view
        placeholders = [node for node in view.graph.nodes if node.op == "placeholder"]
        self.inputs = dict(zip(placeholders, inputs, strict=False))

    def value(self, node: Any) -> Any:
        """What ``node`` holds, symbolic lengths as they were in the call that is compiled.

        Raises:
            Unknown: it depends on tensors without data, or on what is not read here.
        """
        if isinstance(node, (list, tuple)):
            return type(node)(self.value(part) for part in node)
        if isinstance(node, slice):
            return slice(self.value(node.start), self.value(node.stop), self.value(node.step))
        if not isinstance(node, fx.Node):
            return node
        held = node.meta.get("example_value")
        if isinstance(held, torch.SymInt):
            return hint(held)
        if node.op == "placeholder":
            return self._input(node)
        if canonical(node) is None or self.view.writes(node):
            raise Unknown(f"{node.name} has no value yet")
        args = [self.value(arg) for arg in node.args]
        kwargs = {name: self.value(arg) for name, arg in node.kwargs.items()}
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _input(self, node: fx.Node) -> Any:
        value = self.inputs.get(node)
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.device.type == "meta":
            raise Unknown(f"{node.name} has no value yet")
        if self.view.writes_between(node, -1, len(self.view.time)):
            raise Unknown(f"{node.name} is written in the graph")
        return value
