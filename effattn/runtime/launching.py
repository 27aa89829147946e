"""Shared by all launches of generated kernels: launch keys, the launch cache, and facts about devices."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

from effattn.lowering.device import device_type
from effattn.lowering.dialects.triton.terms import LENGTH

Known = Mapping[str, Any]  # what a launcher found out in its first call; read-only afterwards

ALONE = threading.RLock()  # Triton's compiler and interpreter are not thread-safe
MOST_CALLS = 4096
WIDEST_STRIDE = 1 << 21  # offsets within a tile, sums over its rows and dimensions, are 32-bit


def tensor_key(tensor: torch.Tensor) -> tuple:
    """What a launch depends on apart from the data: of the address, kernels are specialised on alignment only."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0, tensor.get_device()


def launch_key(
    plan: Any, tensors: Sequence[torch.Tensor], scalars: Sequence[int] = (), numbers: Sequence[float] = ()
) -> tuple:
    """What all decisions about a call of a plan depend on; the first tensor is the query."""
    key = [plan, tensors[0].dtype == torch.float32 and tf32(), len(numbers)]
    for tensor in tensors:  # as tensor_key, which would be a call for each
        key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0, tensor.get_device())
    for size in scalars:
        key.append(width(size))
    return tuple(key)


def width(size: int) -> int:
    """0 for sizes and scalars that kernels assume to be small, 1 if sums need 64 bits, 2 if the number itself does."""
    return 0 if -LENGTH <= size <= LENGTH else 1 if -(1 << 31) <= size < 1 << 31 else 2


def far(*sizes: int) -> bool:
    """Whether kernels for small lengths and scalars could overflow."""
    return any(map(width, sizes))


_CACHES: weakref.WeakSet[LaunchCache] = weakref.WeakSet()


def forget() -> None:
    """Clear all launch caches."""
    for cache in list(_CACHES):
        cache.clear()


class LaunchCache:
    """Calls by launch key, thread-safe.

    The first call with a key runs alone. It is stored when it has finished, with what its launcher found out. A call is
    a frozen dataclass with a field ``known``, None until then.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple, Any] = {}
        self.find = self._calls.get  # the call with a key that has been run; None: see :meth:`run`
        _CACHES.add(self)

    def __len__(self) -> int:
        return len(self._calls)

    def clear(self) -> None:
        self._calls.clear()

    def keep(self, key: tuple, call: Any) -> Any:
        """Store a call, and return it."""
        with ALONE:
            if len(self._calls) >= MOST_CALLS:
                self._calls.clear()
            self._calls[key] = call
        return call

    def run(self, key: tuple, prepare: Callable[[], Any], start: Callable[[Any], tuple[Any, Known | None]]) -> Any:
        """Run ``start(call)``, which returns (result, known), and return the result.

        ``prepare()`` makes the call for a new key.
        """
        call = self._calls.get(key)
        if call is None:
            with ALONE:
                call = self._calls.get(key)  # another thread may have stored it
                if call is None:
                    call = prepare()
                    result, known = start(call)
                    self.keep(key, replace(call, known=None if known is None else MappingProxyType(known)))
                    return result
        return start(call)[0]


def narrow(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its strides could overflow 32-bit offsets within a tile."""
    _, _, of_rows, of_dims = tensor.stride()
    if of_rows <= WIDEST_STRIDE and of_dims <= WIDEST_STRIDE:
        return tensor
    rows, dims = tensor.shape[2:]
    if (rows > 1 and of_rows > WIDEST_STRIDE) or (dims > 1 and of_dims > WIDEST_STRIDE):
        return tensor.contiguous()
    return tensor


def tf32() -> bool:
    """Whether float32 products may use TF32, as in cuBLAS.

    ``allow_tf32`` and ``torch.get_float32_matmul_precision()`` raise if the newer settings were used. This property
    follows whichever was set last, and ``torch.backends.fp32_precision`` if it is "none".
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """ "sm90", "gfx942", ..., or "interpreter" on a CPU."""
    if interpreted(device):
        return "interpreter"
    properties = torch.get_device_module(device).get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}" if hasattr(properties, "major") else device.type


@lru_cache(maxsize=64)
def interpreted(device: torch.device) -> bool:
    """Whether kernels run by Triton's interpreter there."""
    return device_type(device.type).kernels == "interpreted"


def too_narrow(tensor: torch.Tensor) -> bool:
    """Whether a tensor must be widened first: the interpreter multiplies no tiles of bfloat16."""
    return tensor.dtype == torch.bfloat16 and interpreted(tensor.device)


def on_device(device: torch.device):
    """A context in which kernels launch on ``device``; on a CPU, the lock of the interpreter's global state."""
    if interpreted(device):
        return ALONE
    if device.index != torch.accelerator.current_device_index():
        return torch.accelerator.device_index(device.index)
    return _NOTHING


_NOTHING = contextlib.nullcontext()
