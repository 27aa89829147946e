"""How many attentions a model runs: counted in an eager forward, by a way that shares nothing with the backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._higher_order_ops.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_WHOLE = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.nn.functional.softmax}
_PRODUCT = {
    torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
    torch.functional.einsum, Tensor.__rmatmul__,
}  # fmt: skip
# what may be done to weights on their way to the product with value
_PASSED = {
    F.dropout, torch.dropout, Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.view, Tensor.reshape,
    torch.reshape, Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.contiguous,
    Tensor.masked_fill,
    Tensor.mul, torch.mul, Tensor.__mul__, Tensor.unsqueeze, Tensor.squeeze, Tensor.expand, Tensor.__getitem__,
    Tensor.nan_to_num, torch.nan_to_num, Tensor.flatten, Tensor.unflatten, torch.where, Tensor.type, Tensor.clone,
    Tensor.masked_fill_, torch.masked_fill, Tensor.__rmul__, torch.Tensor.narrow, torch.narrow,
}  # fmt: skip


@dataclass
class Watch(TorchFunctionMode):
    """Counts calls that are a whole attention, and softmaxes whose result is multiplied with another tensor."""

    whole: int = 0
    softmaxes: int = 0
    other: int = 0  # softmaxes whose result is no operand of a product: routers, pooling, samplers
    _weights: dict[int, int] = field(default_factory=dict)  # id of a tensor -> which softmax it comes from
    _kept: list[Tensor] = field(default_factory=list)  # so that no id is given twice

    def __post_init__(self):
        super().__init__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _WHOLE:
            self.whole += 1  # what it calls is not seen: the mode is off inside
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if function in _SOFTMAX and isinstance(result, Tensor):
            self.other += 1
            self._remember(result, self.other)
        elif self._weights:
            came_from = [self._weights[id(one)] for one in tree_leaves((args, kwargs)) if id(one) in self._weights]
            if came_from and function in _PRODUCT:
                self._counted(came_from)
            elif came_from and function in _PASSED and isinstance(result, Tensor):
                self._remember(result, came_from[0])
        return result

    def _remember(self, tensor: Tensor, number: int) -> None:
        self._weights[id(tensor)] = number
        self._kept.append(tensor)

    def _counted(self, numbers: list[int]) -> None:
        """The first product of each softmax is the one with value."""
        for number in set(numbers):
            self.softmaxes += 1
            self._weights = {one: of for one, of in self._weights.items() if of != number}

    @property
    def sites(self) -> int:
        return self.whole + self.softmaxes


def softmaxes_of(graph: fx.Graph) -> int:
    """How many softmaxes and whole attentions a graph of Dynamo's holds, of whatever kind."""
    return sum(node.target in _SOFTMAX | _WHOLE | {"softmax", flex_attention} for node in graph.nodes)


def watching(function: Callable[..., Any]) -> tuple[Callable[..., Any], Watch]:
    """``function``, and what is seen whenever it is called."""
    watch = Watch()

    @functools.wraps(function)  # `generate` looks at the signature of a forward
    def watched(*args: Any, **kwargs: Any) -> Any:
        with watch:
            return function(*args, **kwargs)

    return watched, watch
