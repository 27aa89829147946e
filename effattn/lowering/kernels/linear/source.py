"""Source of linear attention: fills the templates ``linear_*.jinja`` for a specialisation."""

from __future__ import annotations

import hashlib
from typing import Any

from effattn.lowering.kernels.linear.spec import LinearSpec
from effattn.lowering.kernels.parameters import Param
from effattn.lowering.kernels.rendering import template_named, tidy
from effattn.lowering.kernels.spec import DTYPES

STATE_BLOCK = 1024  # elements of a state that one program carries across parts
KERNELS = {
    "chunks": ("partial_states", "carry", "outputs"),
    "whole": ("partial_states", "add_up", "outputs"),
    "step": ("step",),
}


def generate(spec: LinearSpec) -> str:
    """The source of a Python module with the kernels of ``spec`` and their ``launch``."""
    context = _context(spec)
    return tidy(template_named(f"linear_{spec.kind}.py.jinja").render(context))


def file_name(spec: LinearSpec, source: str) -> str:
    """A readable name, unique to the source: ``linear_chunks_decay_bf16_f128_ab12cd34.py``."""
    traits = [name for name in ("decay", "ones", "reverse") if getattr(spec, name)]
    width = f"f{spec.features}" + (f"x{spec.value_dim}" if spec.value_dim != spec.features else "")
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return "_".join(["linear", spec.kind, *traits, DTYPES[spec.dtype], width, digest]) + ".py"


def parameters(spec: LinearSpec, kernel: str) -> list[Param]:
    """The parameters of one of ``KERNELS``, in order."""
    element = f"*{DTYPES[spec.dtype]}"
    rates = [Param("log_decay", "*fp32")] if spec.decay else []
    given = [Param("HAS_STATE", "constexpr")]
    constants = [Param(name, "constexpr") for name in kernel_constants(spec)]

    def elements(*names: str) -> list[Param]:
        return [Param(name, element) for name in names]

    def states(*names: str) -> list[Param]:
        return [Param(name, "*fp32") for name in names]

    def strides(*names: str) -> list[Param]:
        return [Param(f"{name}_stride_{dim}", "i32") for name in names for dim in "bhnd"]

    def lengths(*names: str) -> list[Param]:
        return [Param(name, "i32", False) for name in names]

    scales = [Param(name, "fp32", False) for name in ("scale", "eps")]
    if kernel == "partial_states":
        found = [*elements("key", "value"), *rates, *states("states"), *strides("key", "value")]
        found += lengths("state_heads", "length", "span", "parts")
    elif kernel == "carry":
        found = [*rates, *states("initial", "states"), *lengths("state_heads", "span", "parts"), *given]
    elif kernel == "add_up":
        found = [*states("initial", "states", "final"), *lengths("heads", "parts"), *given]
    elif kernel == "step":
        found = [*elements("query", "key", "value"), *rates, *states("initial"), *elements("out"), *states("final")]
        found += [*strides("query", "key", "value", "out"), *lengths("heads", "length"), *scales]
    elif spec.kind == "whole":
        found = [*elements("query"), *states("final"), *elements("out"), *strides("query", "out")]
        found += [*lengths("heads", "length", "span", "parts"), *scales]
    else:
        found = [*elements("query", "key", "value"), *rates, *states("initial", "states"), *elements("out")]
        found += [*states("final"), *strides("query", "key", "value", "out")]
        found += [*lengths("heads", "length", "span", "parts"), *scales, *given]
    return found + constants


def kernel_constants(spec: LinearSpec) -> dict[str, int]:
    """The compile-time constants, the same for every kernel of a file."""
    return {
        "CHUNK": spec.tiles.chunk,
        "FEATURES": spec.features,
        "BLOCK_F": spec.block_f,
        "VALUE_DIM": spec.value_dim,
        "BLOCK_DV": spec.tiles.block_dv,
        "VALUE_TILES": spec.value_tiles,
        "WIDTH": spec.width,
        "STATE_BLOCK": STATE_BLOCK,
        "STATE_TILES": -(-spec.features * spec.width // STATE_BLOCK),
        "QUERY_GROUPS": spec.query_groups,
        "KEY_GROUPS": spec.key_groups,
        "SHARE": spec.key_groups if spec.shared else 1,
    }


def _context(spec: LinearSpec) -> dict[str, Any]:
    """Variables of the templates."""
    constants = kernel_constants(spec)
    params = {kernel: parameters(spec, kernel) for kernel in KERNELS[spec.kind]}
    precision = f', input_precision="{"tf32" if spec.tf32 else "ieee"}"' if spec.dtype == "float32" else ""
    return {
        "kind": spec.kind,
        "dtype": spec.dtype,
        "features": spec.features,
        "value_dim": spec.value_dim,
        "query_groups": spec.query_groups,
        "key_groups": spec.key_groups,
        "decay": spec.decay,
        "ones": spec.ones,
        "reverse": spec.reverse,
        "tiles": spec.tiles,
        "value_tiles": spec.value_tiles,
        "state_tiles": constants["STATE_TILES"],
        "share": constants["SHARE"],
        "constants": constants,
        "params": params,
        "unspecialised": {
            kernel: [param.name for param in found if param.type in ("i32", "fp32") and not param.specialise]
            for kernel, found in params.items()
        },
        "pad_f": spec.block_f != spec.features,
        "pad_dv": spec.value_tiles * spec.tiles.block_dv != spec.value_dim,
        "precision": precision,
    }
