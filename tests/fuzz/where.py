"""Where cases run: on a GPU with kernels that are compiled for it, or on the CPU with Triton's interpreter."""

from __future__ import annotations

import os
import platform

import torch

COMPILED = os.environ.get("TRITON_INTERPRET", "1") in ("", "0")
DEVICE = "cuda" if COMPILED and torch.cuda.is_available() else "cpu"
TARGETS = ("portable", "triton")


def device_name(target: str) -> str:
    """What a record was made on: the GPU, or the processor, with Triton's interpreter or without."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return platform.machine() + (", interpreter" if target == "triton" else "")
