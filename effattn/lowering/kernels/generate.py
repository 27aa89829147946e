"""Generates the source of a kernel from its specialisation, with the generator for its kind."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import sympy

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.fold import UnknownOperation
from effattn.ir.refusal import Refusal, Why
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.lowering.kernels.backward import BackwardGenerator
from effattn.lowering.kernels.distances import DistancesGenerator
from effattn.lowering.kernels.hopper import HopperForward
from effattn.lowering.kernels.hopper_backward import HopperBackward
from effattn.lowering.kernels.listed import ListedGenerator
from effattn.lowering.kernels.score_facts import captured_terms
from effattn.lowering.kernels.source import Generator
from effattn.lowering.kernels.spec import DTYPES, KernelSpec, Kind, Tiles, WantedGradient

WIDEST = 256  # head_dim of a backward; two accumulators of a key tile must fit in registers

GENERATORS: dict[Kind, type[Generator]] = {
    "prefill": Generator,
    "decode": Generator,
    "listed": ListedGenerator,
    "backward": BackwardGenerator,
    "distances": DistancesGenerator,
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


def no_backward(
    attention: AttentionSpec, head_dim: int, value_dim: int, wanted: tuple[str, ...] = ()
) -> Refusal | None:
    """Why there is no generated backward for a plan and the captured tensors in ``wanted``; None if there is one."""
    if max(head_dim, value_dim) > WIDEST:
        return Refusal(Why.HEAD_DIM, f"head dimensions over {WIDEST}")
    grads = tuple(WantedGradient(name, False) for name in wanted)
    made = KernelSpec("backward", "exact", attention, "bfloat16", 64, 64, 1, Tiles(16, 16, 4, 1), wanted=grads)
    apart = replace(made, kind="distances")
    try:
        generate(replace(made, key_ranges=False, list_block=16, list_unit=16))
        if captured_terms(apart):
            generate(apart)
    except (UnknownOperation, KeyError) as error:
        return Refusal(Why.GRADIENT, f"no kernel can compute the derivative of the score: {error}")
    return None
