"""Kernels of linear attention that are compiled for GPUs that are not here."""

from __future__ import annotations

from typing import Any

from specs import ARCHS

from effattn.lowering.kernels.linear.spec import LinearKind, LinearSpec
from effattn.lowering.schedules import linear as linear_configs


def spec(arch: str, kind: LinearKind = "chunks", dtype="bfloat16", features=128, value_dim=128, **traits: Any):
    """The specialisation that such a call gets on ``arch``."""
    bits = 32 if dtype == "float32" else 16
    tiles = linear_configs.choose(kind, arch, bits, features, value_dim, traits.get("ones", False))
    return LinearSpec(kind, dtype, features, value_dim, tiles, **traits)


def compiled() -> dict[str, tuple[LinearSpec, str, str]]:
    """Readable name -> what is compiled, for which architecture, and the kernel in the file."""
    found = {}
    for arch in ARCHS:
        lightning = spec(arch, decay=True)
        made = {
            "lightning partial_states": (lightning, "partial_states"),
            "lightning outputs": (lightning, "outputs"),
            "Hedgehog outputs": (spec(arch, features=256, ones=True, key_groups=4, shared=True), "outputs"),
            "both directions outputs": (spec(arch, "whole", ones=True), "outputs"),
            "F 60 outputs": (spec(arch, features=60, value_dim=64, decay=True, reverse=True), "outputs"),
            "fp32 outputs": (spec(arch, dtype="float32", decay=True), "outputs"),
            "step": (spec(arch, "step", decay=True, ones=True), "step"),
        }
        if arch == "sm90":
            made["lightning carry"] = (lightning, "carry")
            made["fp16 outputs"] = (spec(arch, dtype="float16", features=64, value_dim=64, decay=True), "outputs")
            made["both directions add_up"] = (made["both directions outputs"][0], "add_up")
        found |= {f"{name} {arch}": (one, arch, kernel) for name, (one, kernel) in made.items()}
    return found
