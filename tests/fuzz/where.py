"""Where cases run: on a GPU with kernels that are compiled for it, or on the CPU with Triton's interpreter."""

from __future__ import annotations

import os
import platform

import torch

COMPILED = os.environ.get("TRITON_INTERPRET", "1") in ("", "0")
DEVICE = "cuda" if COMPILED and torch.cuda.is_available() else "cpu"
TARGETS = ("portable", "triton")


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()}, interpreter"
