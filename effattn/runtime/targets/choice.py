"""Which target serves a call: generated kernels, where they can run, or the portable one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache

import torch

from effattn.errors import TargetError
from effattn.settings import warn_once


@lru_cache(maxsize=1)
def triton_is_importable() -> bool:
    """Whether there is a Triton to import; does not import it."""
    return importlib.util.find_spec("triton") is not None


def no_kernels(device: str) -> str | None:
    """Why generated kernels cannot run on a type of device, and what to do; None if they can."""
    if not triton_is_importable():
        return 'Triton is not installed: install it (pip install triton), or leave target="triton" out'
    if device == "cuda":
        return None
    from triton import knobs

    if device == "cpu" and knobs.runtime.interpret:
        return None
    return (
        f"it is on {device!r}, and kernels need an NVIDIA or AMD GPU: move the model and its inputs to one, leave "
        'target="triton" out, or set TRITON_INTERPRET=1 before Python starts, to interpret kernels on the CPU (slow)'
    )


def kernels_serve(wanted: str | None, device: torch.device, unsupported: Callable[[], str | None]) -> bool:
    """Whether generated kernels serve a call; ``wanted``: "triton", "portable", or None: by device.

    ``unsupported`` says why there is none for its dtype or sizes: those go to the portable target, with a warning.

    Raises:
        TargetError: kernels are wanted where none can run.
    """
    if wanted == "portable" or (wanted is None and device.type != "cuda"):
        return False
    if wanted is not None and (why := no_kernels(device.type)) is not None:
        raise TargetError(f"attention by target {wanted!r} cannot run: {why}")
    if not triton_is_importable():
        warn_once("Triton is not installed: using the portable target, which is slower on a GPU", key="no triton")
        return False
    if (reason := unsupported()) is not None:
        warn_once(f"{reason}: using the portable target there, which is slower on a GPU")
        return False
    return True
