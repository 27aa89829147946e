"""What generated kernels do not support: device types, dtypes, sizes and expressions."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch

from effattn.errors import EffattnError
from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.fold import UnknownOperation
from effattn.ir.plan import Plan
from effattn.ir.refusal import Refusal, Why
from effattn.lowering.device import device_type
from effattn.lowering.kernels.generate import generate, no_backward
from effattn.lowering.kernels.spec import DTYPES, MAX_HEAD_DIM, KernelSpec, Tiles


class UnsupportedCall(EffattnError):
    """A call that the Triton target does not support; :func:`why_not` says so in advance."""


@lru_cache(maxsize=1)
def triton_is_importable() -> bool:
    """Whether Triton can be imported; does not import it."""
    return importlib.util.find_spec("triton") is not None


def why_not_on(device: str) -> Refusal | None:
    """Why generated kernels cannot run on a device type, with a hint; None if they can."""
    if not triton_is_importable():
        hint = 'pip install triton, or leave target="triton" out'
        return Refusal(Why.NO_TRITON, "Triton is not installed", hint)
    kernels = device_type(device).kernels
    if kernels == "compiled":
        return None
    if kernels == "interpreted":
        from triton import knobs

        if knobs.runtime.interpret:
            return None
    return Refusal(
        Why.DEVICE,
        f"it is on {device!r}, and kernels need an NVIDIA or AMD GPU",
        'move the model and its inputs to one, leave target="triton" out, or set TRITON_INTERPRET=1 before Python '
        "starts, to interpret kernels on the CPU, which is slow",
    )


def why_not(spec: AttentionSpec, dtype: torch.dtype, head_dim: int, value_dim: int) -> Refusal | None:
    """Why kernels do not support such calls; None if they do."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        return Refusal(Why.DTYPE, f"kernels exist for {', '.join(DTYPES)}, not {name}")
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        return Refusal(Why.HEAD_DIM, f"head dimensions over {MAX_HEAD_DIM} do not fit on a multiprocessor")
    return _unwritable(spec)


@lru_cache(maxsize=4096)
def _unwritable(spec: AttentionSpec) -> Refusal | None:
    try:
        generate(KernelSpec("prefill", "exact", spec, "bfloat16", 64, 64, 1, Tiles(16, 16, 4, 1)))
    except (UnknownOperation, KeyError) as error:
        return Refusal(Why.EXPRESSION, f"no kernel can be written: {error}")
    return None


why_no_backward = lru_cache(maxsize=4096)(no_backward)


def check(plan: Plan, query, key, value, captures) -> None:
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise UnsupportedCall(f"query, key and value must share a dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if query.shape[1] % key.shape[1]:
        raise UnsupportedCall(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key heads")
    if (refusal := why_not(plan.spec, query.dtype, query.shape[3], value.shape[3])) is not None:
        raise UnsupportedCall(str(refusal))
    sizes = {"b": query.shape[0], "h": query.shape[1], "q": query.shape[2], "k": key.shape[2]}
    by_name = dict(zip((spec.name for spec in plan.spec.captures), captures, strict=True))
    for name, dim, index in _plain_indices(plan.spec):
        held = by_name[name].shape[dim]
        needed = sizes[index] if isinstance(index, str) else index + 1
        if held != 1 and held < needed:
            raise UnsupportedCall(f"tensor {name!r} has {held} elements along dimension {dim}, {needed} are read")


@lru_cache(maxsize=4096)
def _plain_indices(spec: AttentionSpec) -> tuple[tuple[str, int, str | int], ...]:
    """(capture, dimension, index symbol or constant) for loads whose index kernels do not check."""
    found: set[tuple[str, int, str | int]] = set()
    for load in expr.loads_of(spec.score, spec.rule):
        for dim, index in enumerate(load.indices):
            if index in expr.INDICES:
                found.add((load.name, dim, index.name))
            elif index.is_Integer:
                found.add((load.name, dim, int(index)))
    return tuple(sorted(found, key=repr))
