"""Kernel parameters: in order, with their types, and the compile-time constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.lowering.dialects.triton.terms import tested_dims
from effattn.lowering.iteration.tile_ranges import key_conditions, tile_ranges
from effattn.lowering.kernels.score_facts import captured_terms, loses_totals
from effattn.lowering.kernels.spec import DTYPES, KernelSpec

_POINTER = {**DTYPES, "bool": "i1", "float64": "fp64"}
_POINTER |= {f"{sign}int{n}": f"{sign or 'i'}{n}" for sign in ("", "u") for n in (8, 16, 32, 64)}

LISTS = ("kv_indices", "kv_num_blocks", "partial_blocks")  # the tensors of a block list
# kernel of the backward -> (tensors with head_dim that it reads, numbers for each row, what it writes)
_INPUTS, _ROWS = ("query", "key", "value", "grad_out"), ("lse", "log_totals", "delta")
BACKWARD: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "row_totals": (("query", "key"), ("lse", "greatest", "log_totals"), ()),
    "grad_query": (_INPUTS, _ROWS, ("grad_of_query",)),
    "grad_key_value": (_INPUTS, _ROWS, ("grad_of_key", "grad_of_value")),
    "grad_distances": (_INPUTS, _ROWS, ()),
}
# the kernel that reduces a term
CAPTURED = {"rows": "grad_query", "keys": "grad_key_value", "pairs": "grad_query", "distances": "grad_distances"}


@dataclass(frozen=True)
class Param:
    """A kernel parameter: its name, and its type in Triton's signatures."""

    name: str
    type: str  # "*bf16", "i32", "fp32", "constexpr"
    specialise: bool = True  # integers: Triton may specialise on divisibility by 16 and on the value 1


# for programs that share the queries of long tiles: their sums, and how many they are
PARTS = [Param("key_parts", "*fp32"), Param("value_parts", "*fp32"), Param("splits", "i32", False)]


def parameters(spec: KernelSpec, kernel: str = "forward") -> list[Param]:
    """The parameters of a kernel of the file, in order.

    ``kernel``: ``forward``; a key of ``BACKWARD``; ``find_allowed`` if there is a :func:`key_condition`.
    """
    element = f"*{DTYPES[spec.dtype]}"
    allowed_keys = [Param("allowed", "*i32")] if key_condition(spec) != sympy.true else []
    if kernel == "find_allowed":
        common = [param for param in _common_parameters(spec) if param.type != "constexpr"]
        return [*allowed_keys, *data_parameters(spec.attention), *common]
    if kernel != "forward":
        inputs, sums, grads = BACKWARD[kernel]
        sums = sums if loses_totals(spec.attention.score) else ("lse", "delta")
        found = [Param(name, element) for name in inputs] + [Param(name, "*fp32") for name in sums]
        terms = [term for term in captured_terms(spec) if kernel == CAPTURED[term.reduced]]
        found += [*list_pointers(spec), *(Param(name, element) for name in grads)]
        found += [Param(term.pointer, f"*{_POINTER.get(term.type, term.type)}") for term in terms]
        found += [Param("units", "*fp32")] if any(term.whole for term in terms) else []
        found += PARTS if spec.long_tiles and kernel == "grad_key_value" else []
        found += data_parameters(spec.attention)
        found += [Param(f"{name}_stride_{dim}", "i32") for name in (*inputs, *grads) for dim in "bhnd"]
        for term in terms:
            dims = len(term.read.load.indices) if term.reduced == "pairs" else 0
            found += [Param(f"{term.pointer}_stride_{dim}", "i32") for dim in range(dims)]
        return found + list_sizes(spec) + _common_parameters(spec)
    found = [Param(name, element) for name in ("query", "key", "value", "out")]
    found += [Param("lse", "*fp32"), *allowed_keys]
    if spec.kind == "decode":
        found.append(Param("parts", "*fp32"))
    found += list_pointers(spec)
    found += data_parameters(spec.attention)
    found += [Param(f"{name}_stride_{dim}", "i32") for name in ("query", "key", "value", "out") for dim in "bhnd"]
    found += list_sizes(spec)
    found.append(Param("splits" if spec.kind == "decode" else "together", "i32", False))
    return found + _common_parameters(spec)


def list_pointers(spec: KernelSpec) -> list[Param]:
    return [Param(name, "*i32") for name in LISTS] if spec.list_block else []


def list_sizes(spec: KernelSpec) -> list[Param]:
    """Strides of batch and list, and how long a list may be."""
    if not spec.list_block:
        return []
    strides = [Param(f"{name}_stride_{dim}", "i32", False) for name in LISTS for dim in "bh"]
    return strides + [Param(name, "i32", False) for name in ("lists", "counted", "width")]


def data_parameters(attention: AttentionSpec) -> list[Param]:
    """Pointers to the captured tensors."""
    return [Param(f"data_{load.name}", f"*{_POINTER.get(load.dtype, load.dtype)}") for load in attention.captures]


def data_sizes(attention: AttentionSpec, tested: dict[str, list[int]] | None = None) -> list[Param]:
    """Strides of captured tensors and the sizes that kernels check (``tested``); scalars and numbers.

    From batch to batch a mask's stride is its length: were kernels specialised on it, new lengths would compile.
    """
    found = []
    tested = sizes_tested(attention) if tested is None else tested
    for load in attention.captures:
        rows = load.ndim != 2  # of larger tensors they are worth it: tiles are loaded, not vectors
        found += [Param(f"{load.name}_stride_{dim}", "i32", rows or dim == 1) for dim in range(load.ndim)]
        found += [Param(f"{load.name}_size_{dim}", "i32", False) for dim in tested[load.name]]
    found += [Param(f"scalar_{name}", "i32", False) for name in attention.scalars]
    return found + [Param(f"number_{name}", "fp32", False) for name in attention.numbers]


def _common_parameters(spec: KernelSpec) -> list[Param]:
    """Lengths, strides of captured tensors, scalars, numbers and constants."""
    found = [Param(name, "i32", False) for name in ("heads", "q_len", "k_len")]
    return found + data_sizes(spec.attention) + [Param(name, "constexpr") for name in kernel_constants(spec)]


def key_condition(spec: KernelSpec) -> Any:
    """The condition on keys that ``find_allowed`` evaluates before the main kernel; true: there is none."""
    if not spec.key_ranges or spec.kind != "decode":
        return sympy.true
    return key_conditions(tile_ranges(spec.attention.rule).residual)[0]


def sizes_tested(attention: AttentionSpec) -> dict[str, list[int]]:
    """Captured tensor -> dimensions whose computed index a kernel has to check."""
    tested: dict[str, set[int]] = {load.name: set() for load in attention.captures}
    for load in expr.loads_of(attention.score, attention.rule):
        tested[load.name].update(tested_dims(load))
    return {name: sorted(dims) for name, dims in tested.items()}


def kernel_constants(spec: KernelSpec) -> dict[str, int | bool]:
    """The compile-time constants of ``forward``."""
    found: dict[str, int | bool] = {
        "BLOCK_M": spec.tiles.block_m,
        "BLOCK_N": spec.tiles.block_n,
        "HEAD_DIM": spec.head_dim,
        "BLOCK_D": spec.block_d,
        "VALUE_DIM": spec.value_dim,
        "BLOCK_DV": spec.block_dv,
        "GROUPS": spec.groups,
    }
    powers = tile_ranges(spec.attention.rule).powers
    if powers is not None and powers.block % spec.tiles.block_n == 0:
        found["LIST_TILES"] = powers.block // spec.tiles.block_n
    if spec.kind == "decode":
        found["DIRECT"] = False
    if spec.kind == "listed":
        found |= {"LIST_BLOCK": spec.list_block, "LIST_UNIT": spec.list_unit}
    return found
