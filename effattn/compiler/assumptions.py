"""Graphs that rely on the values of a model's buffers, and the fallback for when these change.

Before every call, the host compares the identity and version counter of each such tensor; a write in place changes the
counter. Only if one differs is the tensor itself read, once. If it no longer holds the assumed values, the original
graph runs instead, compiled with the tensor as data; if it does again, the first graph runs again. Writes through
``.data`` do not change the counter; a check inside the graph catches these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effattn.passes.canonicalize.assumed import Assumed
from effattn.settings import warn_once

MOST_SEEN = 1024  # sets of tensors to remember: one graph may serve many layers


@dataclass(frozen=True)
class _Seen:
    """Tensors, their version counters, and whether they held the assumed values."""

    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int | None, ...]
    holds: bool

    def still(self, tensors: tuple[Tensor, ...]) -> bool:
        same = all(held() is tensor for held, tensor in zip(self.tensors, tensors, strict=True))
        return same and self.versions == _versions(tensors)


def assuming(
    compiled: Callable, assumed: Sequence[Assumed], inputs: Sequence[Any], otherwise: Callable[[], Callable]
) -> Callable:
    """``compiled`` while its assumptions hold, and otherwise the result of ``otherwise()``.

    Args:
        inputs: of the call being compiled, for which the assumptions hold.
        otherwise: called once, when first needed.
    """
    seen: list[dict[tuple[int, ...], _Seen]] = [{} for _ in assumed]
    made: list[Callable] = []
    for one, places in zip(assumed, seen, strict=True):
        _look(one, inputs, places, known=True)

    def run(*args: Any) -> Any:
        broken = [one for one, places in zip(assumed, seen, strict=True) if not _look(one, args, places)]
        if not broken:
            return compiled(*args)
        for one in broken:
            warn_once(
                f"{one.what} no longer holds what it held when the model was compiled: the graph that reads it is "
                "compiled again with it as data, without forms of a policy. torch._dynamo.reset() compiles the model "
                "anew.",
                key=f"assumed: {one.what}",
            )
        if not made:
            made.append(otherwise())
        return made[0](*args)

    return run


def _look(one: Assumed, args: Sequence[Any], places: dict[tuple[int, ...], _Seen], known: bool = False) -> bool:
    tensors = tuple(args[place] for place in one.inputs)
    key = tuple(map(id, tensors))
    found = places.get(key)
    if found is None or not found.still(tensors):
        versions = _versions(tensors)  # before reading, so that a concurrent write is noticed at the next call
        with torch.no_grad():
            holds = known or one.holds(*args)
        found = _Seen(tuple(map(weakref.ref, tensors)), versions, holds)
        if len(places) >= MOST_SEEN:
            places.clear()
        places[key] = found
    return found.holds


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int | None, ...]:
    """Version counters; tensors created in inference mode have none."""
    return tuple(None if tensor.is_inference() else tensor._version for tensor in tensors)
