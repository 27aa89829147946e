"""What all launches of generated kernels share: facts of tensors and devices, and calls remembered by them."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

import torch

MOST_CALLS = 4096
WIDEST_STRIDE = 1 << 22  # offsets within a tile are 32-bit


def facts(tensor: torch.Tensor) -> tuple:
    """All that a launch depends on beside the place of the data: kernels are specialised on its alignment alone."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0, tensor.get_device()


def remember(calls: dict, known_by: tuple, call: Any) -> None:
    if len(calls) >= MOST_CALLS:
        calls.clear()
    calls[known_by] = call


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
    """Kernels start on the current device: make that the tensors' own."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
