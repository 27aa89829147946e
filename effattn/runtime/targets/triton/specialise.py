"""The kernel for a call: its kind, its tiles, and the number of programs over which keys are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from effattn import settings
from effattn.ir import expr
from effattn.ir.chosen import blocks_of_choice
from effattn.ir.plan import Plan
from effattn.lowering.iteration.tile_ranges import by_formula, tile_ranges
from effattn.lowering.kernels import hopper, hopper_backward
from effattn.lowering.kernels.score_facts import linear_scale
from effattn.lowering.kernels.spec import DECODE_QUERIES, DECODE_ROWS, KernelSpec, Kind, Tiles, padded
from effattn.lowering.schedules import attention as configs
from effattn.runtime.launching import architecture, tf32

MAX_SPLITS = 128
KEYS_PER_SPLIT = 256  # a split with fewer keys costs more to combine than it saves
WAVES = 2  # programs per multiprocessor: all run at the same time, with no short last wave
MOST_LONG_TILES = 4  # more of them fill the machine by themselves
MOST_PARTS = 32  # programs that share a long tile
LEAST_TURNS = 32  # tiles of queries of such a program; their sums are written and read again
MAX_DESCRIPTOR_DIM = 256  # largest box side of a tensor descriptor


def kind_of(plan: Plan, q_len: int, groups: int) -> Kind:
    """The kind of kernel. A call with few queries splits keys over programs, if the plan's tile ranges allow it."""
    if plan.sparsity.select is not None:
        return "listed"
    few = q_len <= DECODE_QUERIES and q_len * groups <= DECODE_ROWS and not plan.spec.dropout
    if few and _walk_allows_decode(plan, q_len == 1):
        return "decode"
    return "prefill" if by_formula(plan.spec.rule) else "listed"


@lru_cache(maxsize=4096)
def _walk_allows_decode(plan: Plan, one_row: bool) -> bool:
    keys = tile_ranges(plan.spec.rule)
    if keys.powers is not None and not one_row:
        return False
    near = (*(keys.near_lower or ()), *keys.near_upper)
    bounds = [*keys.lower, *keys.upper, *near, *([keys.prefix] if keys.prefix is not None else [])]
    bounds += [keys.powers.position] if keys.powers is not None else []
    return not any(bound.has(expr.h) for bound in bounds if hasattr(bound, "has"))


def spec_of(
    plan: Plan,
    dtype: torch.dtype,
    q_len: int,
    groups: int,
    head_dim: int,
    value_dim: int,
    device: torch.device,
    kind: Kind | None = None,
    config: Tiles | None = None,
) -> KernelSpec:
    """The specialisation for calls of this kind on ``device``."""
    kind = kind or kind_of(plan, q_len, groups)
    rows = padded(q_len * groups if kind == "decode" else 0)
    return specialise(plan, kind, dtype, head_dim, value_dim, groups, rows, architecture(device), config, tf32())


@lru_cache(maxsize=4096)
def specialise(
    plan: Plan,
    kind: Kind,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    groups: int,
    rows: int,
    arch: str,
    config: Tiles | None,
    tf32: bool,
) -> KernelSpec:
    """The specialisation for a call. ``rows``: padded rows of a decode tile, otherwise 16."""
    name = str(dtype).removeprefix("torch.")
    bits = 32 if name == "float32" else 16
    tiles = config or configs.choose(kind, plan, arch, bits, head_dim, value_dim, rows)
    spec = KernelSpec(kind, plan.form, plan.spec, name, head_dim, value_dim, groups, tiles, tf32 and bits == 32)
    if plan.sparsity.select is None:
        return over_map(spec) if kind == "listed" or (kind == "backward" and not transposes(plan.spec.rule)) else spec
    if kind != "listed":
        return spec
    expand = plan.sparsity.select.expand
    return replace(spec, key_ranges=False, list_block=expand.block, list_unit=expand.unit, tests_data=True)


def transposes(rule: Any) -> bool:
    """Whether a formula says which queries see a tile of keys, too."""
    return by_formula(rule) and tile_ranges(rule).powers is None


def over_map(spec: KernelSpec) -> KernelSpec:
    """The specialisation that reads a block map with a block for each of its tiles."""
    tiles, kind = spec.tiles, spec.kind
    sizes = {"list_block": tiles.block_m, "list_unit": tiles.block_n}
    return replace(spec, kind="listed" if kind == "prefill" else kind, key_ranges=False, **sizes)  # type: ignore[arg-type]


def over_given_map(spec: KernelSpec, blocks: tuple[int, int] | None) -> KernelSpec | None:
    """The same over a block map with blocks of these sizes; None if tiles do not divide them."""
    if blocks is None or blocks[0] % spec.tiles.block_m or blocks[1] % spec.tiles.block_n:
        return None
    return replace(spec, list_block=blocks[0], list_unit=blocks[1])


def map_blocks(
    plan: Plan, dtype: torch.dtype, groups: int, head_dim: int, value_dim: int, device: torch.device
) -> tuple[int, int] | None:
    """The sizes of the blocks of the block map that long calls visit; None if they visit none."""
    if plan.sparsity.select is not None:
        return None
    kind: Kind = "prefill" if by_formula(plan.spec.rule) else "listed"
    spec = spec_of(plan, dtype, DECODE_ROWS, groups, head_dim, value_dim, device, kind)
    spec = in_gluon(spec, architecture(device), settings.current().precise) or spec
    return (spec.list_block, spec.list_unit) if spec.list_block else None


@lru_cache(maxsize=4096)
def in_gluon(spec: KernelSpec, arch: str, precise: bool) -> KernelSpec | None:
    """The same kernel in the Gluon dialect; None where there is none, or for another architecture.

    Args:
        precise: compute tanh to single precision, not with the chip's own instruction.
    """
    if arch != "sm90":
        return None
    blocks = blocks_of_choice(spec.attention)
    if blocks is not None and any(size % hopper_backward.OWNED for size in blocks):
        return None  # its tiles would hold many blocks
    multiple = linear_scale(spec.attention.score, spec) is not None
    kinds: tuple[Kind, ...] = ("prefill", "listed") if spec.kind == "prefill" else (spec.kind,)
    for kind in kinds:
        tiles = configs.on_hopper(kind, spec.head_dim, spec.value_dim, spec.attention.rule, multiple)
        if tiles is None:
            continue
        found = replace(spec, tiles=tiles, precise=precise)
        if kind == "backward":
            found = replace(found, list_block=0, list_unit=0)
            mapped = replace(found, list_block=hopper_backward.OWNED, list_unit=hopper_backward.OWNED)
            return next((one for one in (found, mapped) if hopper_backward.why_not(one) is None), None)
        if kind == "listed" and not spec.tests_data:
            found = over_map(found)
        if hopper.why_not(found) is None:
            return found
    return None


def fits_gluon(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the Gluon dialect takes these queries, keys and values."""
    return all(tensor.shape[2] <= hopper.MOST_KEYS and describable(tensor) for tensor in tensors)


def splits_for(pairs: int, k_len: int, multiprocessors: int) -> int:
    """Number of programs that share the keys of one (batch, key head) pair; depends on sizes only."""
    wanted = max(1, WAVES * multiprocessors // max(1, pairs))
    return max(1, min(wanted, MAX_SPLITS, -(-k_len // KEYS_PER_SPLIT)))


def long_tiles(spec: KernelSpec) -> int:
    """Of a backward: the first tiles of keys that all later queries see; 0 if there are none, or many."""
    prefix = tile_ranges(spec.attention.rule).prefix
    if spec.wanted or prefix is None or not prefix.is_Integer:
        return 0
    tiles = -(-int(prefix) // spec.tiles.block_m)
    return tiles if 0 < tiles <= MOST_LONG_TILES else 0


def splits_of_long(spec: KernelSpec, long: int, pairs: int, q_len: int, k_len: int, multiprocessors: int) -> int:
    """Number of programs that share the queries of each of the first ``long`` tiles of keys; depends on sizes only."""
    if not long or k_len <= (long - 1) * spec.tiles.block_m:
        return 1
    turns = -(-q_len // (spec.tiles.block_q or spec.tiles.block_n)) * spec.groups
    return max(1, min(multiprocessors // (pairs * long), MOST_PARTS, turns // LEAST_TURNS))


def describable(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor supports ``tensor``: 16-byte alignment and a contiguous last dimension."""
    steps = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in steps)
    whole = tensor.numel() > 0 and padded(tensor.shape[3]) <= MAX_DESCRIPTOR_DIM
    return aligned and whole and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0
