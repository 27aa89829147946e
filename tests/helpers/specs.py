"""Specialisations that are compiled for GPUs that are not here, and three whose source is kept as a golden file."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from plans import CASES, CAUSAL, Sizes, power_keep

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import FloorDiv, Modulo, Nk, Nq, b, h, k, load, q, s
from effattn.ir.plan import Plan, Sparsity
from effattn.ir.site import Layout, called_site
from effattn.lowering.forms import FORMS
from effattn.lowering.iteration.tile_ranges import by_formula
from effattn.lowering.kernels.parameters import CAPTURED
from effattn.lowering.kernels.score_facts import captured_terms
from effattn.lowering.kernels.selection.block_map import MapSpec
from effattn.lowering.kernels.selection.score import ScoreSpec
from effattn.lowering.kernels.spec import KernelSpec, Tiles, WantedGradient
from effattn.lowering.schedules import attention as configs
from effattn.runtime.targets.triton.specialise import over_map, transposes

ARCHS = ("sm80", "sm90", "sm100", "gfx942")
PREFILL = ("causal", "left_padding", "window_and_sinks", "power_128", "documents", "soft_cap", "alibi", "bias")
LEARNED = (("bias", "bias", True), ("bias_by_distance", "table", False), ("decay_of_times", "times", False))
DECODE = ("cache_by_pointer", "left_padding", "power_128")


def spec(name: str, arch: str, kind="prefill", dtype="bfloat16", dim=128, value_dim=None, groups=4, tiles=None):
    """The specialisation that a call of this plan gets on ``arch``."""
    sizes = Sizes(head_dim=dim, heads=4, q_len=1 if kind == "decode" else 57)
    if name == "power_128":
        plan = Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, power_keep(128, 2048, 128), empty_rows="never"))
    elif name == "dropout":
        plan = CASES["left_padding"](sizes, torch.device("cpu")).plan
        plan = replace(plan, spec=replace(plan.spec, dropout=0.1).seeded)
    else:
        plan = CASES[name](sizes, torch.device("cpu")).plan
    value_dim = value_dim or dim
    bits = 32 if dtype == "float32" else 16
    tiles = tiles or configs.choose(kind, plan, arch, bits, dim, value_dim, rows=groups)
    found = KernelSpec(kind, plan.form, plan.spec, dtype, dim, value_dim, groups, tiles)
    finds = {"prefill": by_formula, "backward": transposes}.get(kind)
    return found if finds is None or finds(plan.spec.rule) else over_map(found)


def selector_plan(form: str, **params) -> Plan:
    chosen, spec = FORMS[form], AttentionSpec(Sizes(head_dim=128).scale * s, CAUSAL)
    site = called_site(spec, q, Layout(1, 4, 1, Nq, Nk, 128, 128))
    return Plan(form, spec, Sparsity(chosen.selector(chosen.params(**params), site)))


def listed(arch: str, form: str, dtype="bfloat16", **params) -> KernelSpec:
    plan = selector_plan(form, **params)
    bits = 32 if dtype == "float32" else 16
    tiles = configs.choose("listed", plan, arch, bits, 128, 128)
    expand = plan.sparsity.select.expand
    more = (False, False, expand.block, expand.unit, True)
    return KernelSpec("listed", plan.form, plan.spec, dtype, 128, 128, 4, tiles, *more)


def selectors(arch: str) -> dict[str, tuple[KernelSpec | ScoreSpec | int, str]]:
    """What the forms that choose at run time compile on ``arch``."""
    proxy = selector_plan("proxy")
    ranking = ScoreSpec(proxy.form, proxy.spec, "bfloat16", 128, 1, 4, 4, 32, 32, "max", "max", 4)
    mass = replace(ranking, groups=4, q_stride=1, k_stride=1, height=128, width=128, rows="mean", columns="sum")
    return {
        "proxy listed": (listed(arch, "proxy"), "forward"),
        "dhsa listed": (listed(arch, "dhsa"), "forward"),
        "tokens listed": (listed(arch, "dhsa", unit=1), "forward"),
        "proxy listed fp32": (listed(arch, "proxy", dtype="float32"), "forward"),
        "ranking totals": (ranking, "row_totals"),
        "ranking cells": (ranking, "cells"),
        "mass totals": (mass, "row_totals"),
        "mass cells": (mass, "cells"),
        "choose 1024": (1024, "choose"),
        **({"choose 4096": (4096, "choose")} if arch == "sm90" else {}),
        "cover 1024": (1024, "cover"),
    }


def hopper() -> dict[str, KernelSpec]:
    """Kernels in the Gluon dialect, which exists for one architecture."""
    found = {f"{name} D {dim}": on_hopper(name, dim) for name in ("causal", "soft_cap", "alibi") for dim in (64, 128)}
    found |= {f"causal D {dim}": on_hopper("causal", dim) for dim in (96, 256)}
    found |= {f"window D {dim}": on_hopper("window", dim) for dim in (64, 128)}
    found["power_128 listed D 64"] = on_hopper("power_128", 64, kind="listed")
    found["units of 32 keys"] = replace(on_hopper("causal", 64, kind="listed"), list_unit=32, tests_data=True)
    found["causal D 192, values 128"] = on_hopper("causal", 192, 128)
    for name in ("documents", "left_padding", "bias", "power_128"):
        found[f"{name} listed"] = on_hopper(name, 128, kind="listed")
    return found | {"causal fp16": on_hopper("causal", 128, dtype="float16")}


def hopper_backward() -> dict[str, KernelSpec]:
    found = {
        f"{name} D {dim}": on_hopper(name, dim, kind="backward")
        for name in ("causal", "soft_cap", "alibi")
        for dim in (64, 128)
    }
    shared = replace(on_hopper("wide_window_and_sinks", 128, kind="backward"), long_tiles=1)
    listed = replace(on_hopper("documents", 128, kind="backward"), list_block=128, list_unit=128)
    return found | {"documents": listed, "shared sinks": shared}


def on_hopper(name: str, dim: int, value_dim: int | None = None, kind="prefill", dtype="bfloat16") -> KernelSpec:
    one = spec(name, "sm90", kind, dtype, dim, value_dim)
    tiles = configs.on_hopper(kind, dim, value_dim or dim, one.attention.rule, name == "causal")
    assert tiles is not None
    one = replace(one, tiles=tiles)
    return replace(over_map(one) if kind == "listed" else one, precise=False)


def block_maps() -> dict[str, tuple[MapSpec, str]]:
    """Block maps: of documents both ways, and of a rule with every kind of table."""
    documents = CASES["documents"](Sizes(), torch.device("cpu")).plan.spec
    x, y = (load("times", [b, index], integer=False) for index in (q, k))
    kinds, seen = load("kinds", [q], integer=True), sympy.Ne(load("seen", [k], integer=True), 0)
    pairs = sympy.Ne(load("pairs", [b, 0, q, k], integer=True), 0)
    blocks = sympy.Ne(load("blocks", [h, FloorDiv(q, 64), FloorDiv(k, 64)], integer=True), 0)
    captures = tuple(
        CaptureSpec(*each)
        for each in (
            ("times", "float32", 2),
            ("pairs", "bool", 4),
            ("blocks", "bool", 3),
            ("kinds", "int64", 1),
            ("seen", "bool", 1),
        )
    )
    every = AttentionSpec(
        s,
        sympy.And(pairs, blocks, sympy.Or(x - y < 2.5, sympy.Eq(Modulo(q - k, 3), 0), seen, kinds > 0)),
        captures=captures,
    )
    return {
        "documents tabulate": (MapSpec(documents, 192, 64), "tabulate"),
        "documents list_blocks": (MapSpec(documents, 128, 128), "list_blocks"),
        "documents transposed list_blocks": (MapSpec(documents, 192, 128, transposed=True), "list_blocks"),
        "tables tabulate": (MapSpec(every, 64, 128), "tabulate"),
        "tables tabulate_pairs": (MapSpec(every, 192, 128), "tabulate_pairs"),
        "tables list_blocks": (MapSpec(every, 192, 128, wide=True), "list_blocks"),
    }


def compiled() -> dict[str, tuple[KernelSpec | ScoreSpec | MapSpec | int, str, str]]:
    """Readable name -> what is compiled, for which architecture, and the kernel in the file."""
    found = {}
    for arch in ARCHS:
        made = {f"{name} prefill": spec(name, arch) for name in PREFILL}
        made |= {f"{name} decode": spec(name, arch, "decode") for name in DECODE}
        made |= {f"causal D {dim}": spec("causal", arch, dim=dim, value_dim=dv) for dim, dv in ((60, 60), (96, 64))}
        made["powers and bits"] = spec("powers_and_bits", arch, dim=64, tiles=Tiles(64, 32, 4, 2))
        made["causal D 256"] = spec("causal", arch, dim=256)
        made["causal fp32"] = spec("causal", arch, dtype="float32", dim=64)
        made["causal fp32 D 128"] = spec("causal", arch, dtype="float32")
        made["decode fp32"] = spec("cache_by_pointer", arch, "decode", dtype="float32")
        if arch == "sm90":
            made |= {f"hopper {name}": one for name, one in hopper().items()}
            found |= {
                f"hopper {name} {kernel} sm90": (one, arch, kernel)
                for name, one in hopper_backward().items()
                for kernel in ("grad_query", "grad_key_value")
            }
        found |= {f"{name} {arch}": (one, arch, "forward") for name, one in made.items()}
        found[f"left_padding find_allowed {arch}"] = (made["left_padding decode"], arch, "find_allowed")
        found |= {f"{name} {arch}": (one, arch, kernel) for name, (one, kernel) in selectors(arch).items()}
        found |= {f"{name} {arch}": (one, arch, kernel) for name, (one, kernel) in block_maps().items()}
        for name in ("causal", "left_padding"):
            one = spec(name, arch, "backward")
            found |= {f"{name} {kernel} {arch}": (one, arch, kernel) for kernel in ("grad_query", "grad_key_value")}
        for name in ("soft_cap", "alibi", "bias"):
            one = spec(name, arch, "backward")
            kernels = ["grad_query", "grad_key_value", *(["row_totals"] if name == "bias" else [])]
            found |= {f"{name} {kernel} {arch}": (one, arch, kernel) for kernel in kernels}
        dropped = {kind: spec("dropout", arch, kind) for kind in ("prefill", "backward")}
        found[f"dropout prefill {arch}"] = (dropped["prefill"], arch, "forward")
        for kernel in ("grad_query", "grad_key_value"):
            found[f"dropout {kernel} {arch}"] = (dropped["backward"], arch, kernel)
        for name, capture, owned in LEARNED:
            for kind in ("backward", "distances"):
                one = replace(spec(name, arch, kind), wanted=(WantedGradient(capture, owned),))
                one = replace(one, tiles=configs.beside_captures(one.tiles)) if kind == "backward" else one
                kernels = sorted({CAPTURED[term.reduced] for term in captured_terms(one)})
                found |= {f"learned {name} {kernel} {arch}": (one, arch, kernel) for kernel in kernels}
    return found


def goldens() -> dict[str, KernelSpec]:
    """Name of the golden file -> what it holds: the three texts that are worth reading whole."""
    return {
        "left_padding_prefill": spec("left_padding", "sm90"),
        "left_padding_decode": spec("left_padding", "sm90", "decode"),
        "causal_backward": spec("causal", "sm90", "backward"),
        "documents_hopper": on_hopper("documents", 128, kind="listed"),
    }
