"""The operations of expressions in torch, for the portable target, the references and the checks.

A value is a Python number or a tensor that broadcasts against the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.ir.attention import AttentionSpec
from effattn.ir.fold import Integers, fold
from effattn.runtime.operations import ARITHMETIC, LOGICAL, boolean, integer


@dataclass(frozen=True)
class Span:
    """The value of an index symbol that is one or more runs of consecutive integers, which loads read by slicing.

    ``tensor`` holds the same indices for other uses: int64, in a shape that broadcasts against the scores.
    """

    tensor: Tensor
    parts: tuple[tuple[int, int], ...]  # (start, stop)

    @staticmethod
    def of(parts: Sequence[tuple[int, int]], device: Any, *shape: int) -> Span:
        ranges = [torch.arange(start, stop, device=device) for start, stop in parts]
        tensor = ranges[0] if len(ranges) == 1 else torch.cat(ranges)
        return Span(tensor.view(shape) if shape else tensor, tuple(parts))


def plain(value: Any) -> Any:
    return value.tensor if isinstance(value, Span) else value


def read_slices(tensor: Tensor, indices: Sequence[Any]) -> Tensor | None:
    """``tensor[indices]`` by slicing, if every index is a number or a span within bounds; else None."""
    spans: list[Span] = []
    for index, size in zip(indices, tensor.shape, strict=True):
        if isinstance(index, Tensor):
            return None
        low, high = (index.parts[0][0], index.parts[-1][1]) if isinstance(index, Span) else (index, index + 1)
        if low < 0 or high > size:
            return None
        if isinstance(index, Span):
            spans.append(index)
    dims = max((span.tensor.ndim for span in spans), default=0)
    shape, order = [1] * dims, []
    for place, span in enumerate(spans):
        own = [(dims - span.tensor.ndim + dim, size) for dim, size in enumerate(span.tensor.shape) if size > 1]
        if any(shape[dim] > 1 for dim, _ in own):
            return None  # two indices along one dimension: a diagonal
        for dim, size in own:
            shape[dim] = size
        order.append((own[0][0] if own else dims, place))
    read = tensor[tuple(slice(None) if isinstance(index, Span) else index for index in indices)]
    for place, span in enumerate(spans):
        slices = [read.narrow(place, start, stop - start) for start, stop in span.parts]
        read = slices[0] if len(slices) == 1 else torch.cat(slices, dim=place)
    return read.permute([place for _, place in sorted(order)]).reshape(shape)


class TorchAlgebra:
    """Torch tensors as the values of an expression; see :func:`effattn.ir.fold.fold`.

    Args:
        symbols: value of each symbol: indices (tensors or spans), lengths, scalars, numbers, ``s``. Tensors broadcast
            against the scores.
        captures: captured tensors by name. Indices are clamped to their sizes.
        dtype: dtype in which floating-point captures are read.
        device: device of new tensors that depend on no other tensor.
    """

    def __init__(self, symbols: Mapping[str, Any], captures: Mapping[str, Tensor], dtype: torch.dtype, device: Any):
        self.symbols = symbols
        self.captures = captures
        self.dtype = dtype
        self.device = device

    def constant(self, value):
        return value

    def symbol(self, name):
        return self.symbols[name]

    def load(self, name, indices):
        tensor = self.captures[name]
        # every index of a dimension of size 1 is clamped to 0, so that what broadcasts stays small
        indices = [0 if size == 1 else index for index, size in zip(indices, tensor.shape, strict=True)]
        read = read_slices(tensor, indices)
        if read is None:
            clamped = [self._clamp(plain(index), size) for index, size in zip(indices, tensor.shape, strict=True)]
            read = tensor[tuple(clamped)] if clamped else tensor
        if read.dtype == torch.bool:
            return read
        return read.to(self.dtype if read.is_floating_point() else torch.int64)  # no arithmetic in 8 or 16 bits

    def _clamp(self, index, size: int):
        if isinstance(index, Tensor):
            return integer(index).clamp(0, size - 1)
        return max(0, min(int(index), size - 1))

    def call(self, operation, *args):
        args = tuple(plain(arg) for arg in args)
        if operation == "where":
            return self._where(*args)
        if (logical := LOGICAL.get(operation)) is not None:
            return logical(*args)
        args = tuple(integer(arg) for arg in args)
        if operation == "div" or any(isinstance(arg, float) for arg in args):
            # torch would convert integers to the default dtype
            args = tuple(self._float(arg) for arg in args)
        return ARITHMETIC[operation](*args)

    def _float(self, value):
        return value.to(self.dtype) if isinstance(value, Tensor) and not value.is_floating_point() else value

    def _where(self, condition, x, y):
        if not isinstance(condition, Tensor):
            return x if condition else y
        x, y = integer(x), integer(y)
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return torch.where(boolean(condition), x, y)
        whole = isinstance(x, int) and isinstance(y, int)
        kind = torch.int64 if whole else self.dtype
        return torch.where(
            boolean(condition), *(torch.full((), value, dtype=kind, device=condition.device) for value in (x, y))
        )


def bindings(
    spec: AttentionSpec, captures: Sequence[Tensor], scalars: Sequence[int], numbers: Sequence[float]
) -> tuple[dict, dict]:
    """``(symbols, tensors)`` of one call: the values of a spec's names. Raises ValueError if the counts differ."""
    check_counts(spec, captures, scalars, numbers)
    symbols: dict[str, Any] = dict(zip((*spec.scalars, *spec.numbers), (*scalars, *numbers), strict=True))
    return symbols, {load.name: tensor for load, tensor in zip(spec.captures, captures, strict=True)}


def check_counts(spec: AttentionSpec, captures: Sequence[Any], scalars: Sequence[Any], numbers: Sequence[Any]) -> None:
    """Raise ValueError if a call has not as many tensors, scalars and numbers as the spec names."""
    for what, names, given in (
        ("tensors", spec.captures, captures),
        ("scalars", spec.scalars, scalars),
        ("numbers", spec.numbers, numbers),
    ):
        if len(names) != len(given):
            raise ValueError(f"this plan takes {len(names)} {what}, got {len(given)}")


class _Recorder:
    """An algebra whose values are positions in a list of steps, which :func:`evaluate` replays."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Any, tuple[int, ...]]] = []

    def _step(self, method: str, subject: Any, operands: Sequence[int] = ()) -> int:
        self.steps.append((method, subject, tuple(operands)))
        return len(self.steps) - 1

    def constant(self, value):
        return self._step("constant", value)

    def symbol(self, name):
        return self._step("symbol", name)

    def load(self, name, indices):
        return self._step("load", name, indices)

    def call(self, operation, *args):
        return self._step("call", operation, args)


@lru_cache(maxsize=4096)
def _steps(term) -> tuple[tuple[str, Any, tuple[int, ...]], ...]:
    """An expression as steps; the last is its value. Cached, since walking a sympy tree per chunk would be slow."""
    recorder = _Recorder()
    fold(sympy.sympify(term), recorder)
    return tuple(recorder.steps)


def evaluate_integer(term, symbols: Mapping[str, int]) -> int:
    """The value of an integer expression without captured tensors. Faster than :func:`evaluate`."""
    values: list[Any] = []
    for method, subject, operands in _steps(term):
        if method == "call":
            values.append(Integers.TABLE[subject](*[values[operand] for operand in operands]))
        else:
            values.append(symbols[subject] if method == "symbol" else subject)
    return values[-1]


def evaluate(term, symbols: Mapping[str, Any], captures: Mapping[str, Tensor], dtype: torch.dtype, device: Any) -> Any:
    """The value of an expression: a tensor that broadcasts against the scores, or a Python number or bool.

    Raises:
        UnknownOperation: no target computes one of its operations.
        KeyError: it reads a symbol or captured tensor that is not given.
    """
    algebra = TorchAlgebra(symbols, captures, dtype, device)
    values: list[Any] = []
    for method, subject, operands in _steps(term):
        given = [values[operand] for operand in operands]
        if method == "call":
            values.append(algebra.call(subject, *given))
        elif method == "load":
            values.append(algebra.load(subject, given))
        else:
            values.append(algebra.symbol(subject) if method == "symbol" else subject)
    return plain(values[-1])
