"""Values of nodes at compile time, computed from the tensors that Dynamo passes to the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from effattn.passes.graph.view import GraphView, hint
from effattn.passes.graph.vocabulary import canonical


class Unknown(Exception):
    """The value cannot be computed at compile time; the message says why."""


class Known:
    """Computes values through views and arithmetic from inputs. They may differ when the graph runs."""

    def __init__(self, view: GraphView, inputs: Sequence[Any]):
        self.view = view
        placeholders = [node for node in view.graph.nodes if node.op == "placeholder"]
        self.inputs = dict(zip(placeholders, inputs, strict=False))

    def value(self, node: Any) -> Any:
        """The value of ``node``, with symbolic lengths as in the call that is being compiled.

        Raises:
            Unknown: it depends on a tensor without data or on an operation outside the vocabulary.
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
