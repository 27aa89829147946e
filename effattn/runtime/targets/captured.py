"""Gradients of captured tensors: what each score gives to the element that it read, added up in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effattn.lowering.device import on_host
from effattn.runtime.operations import integer


def add_at(total: Tensor, indices: Sequence[Tensor | int], values: Tensor) -> None:
    """``total[indices] += values``, where elements may be named more than once.

    Args:
        total: contiguous.
        indices: one for each dimension of ``total``; tensors broadcast against ``values``. Those outside are clamped,
            as in :class:`effattn.runtime.algebra.TorchAlgebra`, and that of a dimension of size 1 is 0.
        values: of the dtype of ``total``.
    """
    place: Tensor | int = 0
    for index, size, step in zip(indices, total.shape, total.stride(), strict=True):
        if size > 1:
            inside = integer(index).clamp(0, size - 1) if isinstance(index, Tensor) else max(0, min(index, size - 1))
            place = place + inside * step
    if not isinstance(place, Tensor):
        total.view(-1)[place] += values.sum()
        return
    place = place.reshape((1,) * (values.ndim - place.ndim) + tuple(place.shape))
    shared = [dim for dim in range(values.ndim) if place.shape[dim] == 1 and values.shape[dim] > 1]
    values = values.sum(shared, keepdim=True) if shared else values
    place = place.expand(values.shape).reshape(-1)
    if on_host(total):
        total.view(-1).index_add_(0, place, values.reshape(-1))
    else:  # sorted first, so that the order of the sums is the same in every run
        total.view(-1).index_put_((place,), values.reshape(-1), accumulate=True)
