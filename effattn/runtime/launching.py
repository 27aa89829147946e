"""What all launches of generated kernels share: what tensors and devices they depend on, and the cache of calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

from effattn.lowering.dialects.triton.terms import LENGTH

Known = Mapping[str, Any]  # what a launcher found out at a first call; never written to afterwards

ALONE = threading.RLock()  # Triton's compiler and its interpreter serve one thread at a time
MOST_CALLS = 4096
WIDEST_STRIDE = 1 << 21  # offsets within a tile are 32-bit, and sums over its rows and dimensions


def tensor_key(tensor: torch.Tensor) -> tuple:
    """All that a launch depends on beside the place of the data: kernels are specialised on its alignment alone."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0, tensor.get_device()


def width(size: int) -> int:
    """0 for a size or scalar that kernels take to be small, 1 where a sum needs 64 bits, 2 where the number does."""
    return 0 if -LENGTH <= size <= LENGTH else 1 if -(1 << 31) <= size < 1 << 31 else 2


def far(*sizes: int) -> bool:
    """Whether kernels for small lengths and scalars could count too far."""
    return any(map(width, sizes))


class LaunchCache:
    """Launches by all that they depend on, for many threads.

    The first of its kind runs alone, and is put only when it is over, with all that its launcher found out. A
    call is a frozen dataclass with a field ``known``, None before that.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple, Any] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def clear(self) -> None:
        self._calls.clear()

    def run(self, key: tuple, prepare: Callable[[], Any], start: Callable[[Any], tuple[Any, Known | None]]) -> Any:
        """The first of what ``start(call)`` returns; the second is what its launcher knows.

        ``prepare()`` makes a call that is not known yet.
        """
        call = self._calls.get(key)
        if call is None:
            with ALONE:
                call = self._calls.get(key)  # another thread may have been the first
                if call is None:
                    call = prepare()
                    result, known = start(call)
                    if len(self._calls) >= MOST_CALLS:
                        self._calls.clear()
                    self._calls[key] = replace(call, known=None if known is None else MappingProxyType(known))
                    return result
        return start(call)[0]


def narrow(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if steps within a tile are so wide that 32-bit offsets could overflow."""
    rows, dims = tensor.shape[2:]
    if (rows > 1 and tensor.stride(2) > WIDEST_STRIDE) or (dims > 1 and tensor.stride(3) > WIDEST_STRIDE):
        return tensor.contiguous()
    return tensor


def tf32() -> bool:
    """Whether float32 products may round their inputs, as cuBLAS's may.

    ``allow_tf32`` and ``torch.get_float32_matmul_precision()`` raise where newer settings were used. This one follows
    whatever was set last, old or new, and where it is "none" what ``torch.backends.fp32_precision`` says.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """ "sm90", "gfx942", ..., or "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on_device(device: torch.device):
    """Kernels start on the current device: make that the tensors' own. The interpreter's state is the process's."""
    if device.type != "cuda":
        return ALONE
    if device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
