"""Generates the source of a kernel from its specialisation, with the generator for its kind."""

from __future__ import annotations

import hashlib

import sympy

from effattn.ir import expr
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.lowering.kernels.backward import BackwardGenerator
from effattn.lowering.kernels.hopper import HopperForward
from effattn.lowering.kernels.hopper_backward import HopperBackward
from effattn.lowering.kernels.listed import ListedGenerator
from effattn.lowering.kernels.source import Generator
from effattn.lowering.kernels.spec import DTYPES, KernelSpec, Kind

GENERATORS: dict[Kind, type[Generator]] = {
    "prefill": Generator,
    "decode": Generator,
    "listed": ListedGenerator,
    "backward": BackwardGenerator,
}


ON_HOPPER: dict[Kind, type[HopperForward]] = {
    "prefill": HopperForward,
    "listed": HopperForward,
    "backward": HopperBackward,
}


def generate(spec: KernelSpec) -> str:
    """The source of a Python module with the kernel of ``spec`` and its ``launch``.

    Raises:
        UnknownOperation: kernels cannot compute an operation of the score or predicate.
    """
    table = ON_HOPPER if spec.tiles.consumers else GENERATORS
    return table[spec.kind](spec).source()


def file_name(spec: KernelSpec, source: str) -> str:
    """A readable name, unique to the source: ``power_causal_bf16_d128_g4_ab12cd34.py``."""
    keys = tile_ranges(spec.attention.rule)
    mask = "causal" if any(bound.has(expr.q) for bound in keys.upper) else "full"
    mask = "masked" if keys.residual != sympy.true else mask
    width = f"d{spec.head_dim}" + (f"x{spec.value_dim}" if spec.value_dim != spec.head_dim else "")
    kind = "" if spec.kind == "prefill" else f"_{spec.kind}"
    kind += "_hopper" if spec.tiles.consumers else ""
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return f"{spec.form}_{mask}{kind}_{DTYPES[spec.dtype]}_{width}_g{spec.groups}_{digest}.py"
