"""Tile sizes by architecture, dtype and head_dim: the fastest measured, or ones that compile without spills."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from effattn.ir.chosen import blocks_of_choice
from effattn.ir.plan import Plan
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.lowering.kernels.spec import MIN_TILE, Kind, Tiles, padded

# H200, D 128, causal: tiles of 128 x 64, 8 warps and 3 stages were fastest; 4 warps spill. H100, D 64, 131,072 tokens:
# 1.07 times cuDNN's time with 4 warps, 1.34 with 8.
# (architecture, bits of the dtype) -> rows (largest padded head_dim, tiles); the first row that fits is used
PREFILL: dict[tuple[str, int], tuple[tuple[int, Tiles], ...]] = {
    ("sm90", 16): (
        (64, Tiles(128, 64, 4, 3)),
        (128, Tiles(128, 64, 8, 3)),
        (256, Tiles(128, 64, 8, 2)),
        (512, Tiles(32, 32, 8, 2)),
    ),
    ("sm100", 16): (
        (128, Tiles(128, 64, 8, 3)),
        (256, Tiles(128, 32, 8, 2)),
        (512, Tiles(32, 32, 8, 2)),
    ),
    ("sm80", 16): (
        (64, Tiles(128, 64, 8, 3)),
        (128, Tiles(128, 64, 8, 3)),
        (256, Tiles(64, 32, 8, 2)),
        (512, Tiles(32, 32, 8, 1)),
    ),
    ("gfx942", 16): (
        (128, Tiles(128, 64, 4, 1)),
        (256, Tiles(64, 32, 4, 1)),
        (512, Tiles(32, 16, 4, 1)),
    ),
    ("any", 32): (
        (64, Tiles(64, 32, 8, 2)),
        (128, Tiles(32, 16, 4, 2)),
        (256, Tiles(32, 16, 8, 1)),
        (512, Tiles(16, 16, 8, 1)),
    ),
    ("interpreter", 16): ((512, Tiles(32, 32, 4, 1)),),
    ("interpreter", 32): ((512, Tiles(32, 32, 4, 1)),),
}
# masks that keep few keys per query: (architecture, bits, kind of mask, padded head_dim), instead of the rows above;
# measured at 8K to 128K
SPARSE: dict[tuple[str, int, str, int], Tiles] = {
    ("sm90", 16, "list", 128): Tiles(128, 128, 8, 2),
    ("sm90", 16, "band", 128): Tiles(64, 64, 4, 3),
}


@dataclass(frozen=True)
class HopperRow:
    """Tiles of the Gluon dialect for padded head dimensions up to ``width``."""

    width: int
    kind: Kind
    tiles: Tiles
    shape: str | None = None  # of the mask: see shape_of; None: any
    multiple: bool = False  # only scores that are a multiple of the raw one


# H200, bf16, heads 32/8, 32,768 tokens, calls of the variants take turns. Over cuDNN's causal kernel: causal, D 128
# 0.94, persistent 0.95; D 256 0.96, persistent 0.98; D 64 0.88 with three consumers, persistent 0.94, two consumers
# 1.00, two programs 1.06. Over FlexAttention's: window of 1,024, D 128 0.71, persistent 0.59; window with sinks, D
# 128 0.68, persistent 0.65 to 0.70; D 64 1.24 with three consumers, two 1.08, persistent 1.00, two programs 0.94 to
# 0.97. Power, D 128 0.58, persistent 0.56 to 0.62; D 64 1.04, persistent 0.97, two programs 0.89 to 0.92. Documents
# of 5,000: 0.70 to 0.77, persistent 0.82, since their blocks see different numbers of keys.
# Backward, over cuDNN's causal one: causal, D 128 1.01, with tiles of 128 keys 1.11; D 64 0.93 with tiles of 128 keys
# and 128 queries, 1.05 with 64 and 64; soft-cap there 2.45 and 1.44, since the large tiles spill.
HOPPER: tuple[HopperRow, ...] = (
    HopperRow(64, "prefill", Tiles(128, 64, 4, 3, consumers=2, programs=2), shape="band"),
    HopperRow(64, "prefill", Tiles(192, 128, 4, 2, consumers=3)),
    HopperRow(64, "listed", Tiles(128, 64, 4, 3, consumers=2, programs=2), shape="powers"),
    HopperRow(64, "listed", Tiles(128, 128, 4, 2, consumers=2)),
    HopperRow(64, "backward", Tiles(128, 128, 4, 2, consumers=2, block_q=128, partial_stages=2), multiple=True),
    HopperRow(64, "backward", Tiles(128, 64, 4, 4, consumers=2, block_q=64, partial_stages=3)),
    HopperRow(128, "prefill", Tiles(128, 128, 4, 2, consumers=2, persistent=True), shape="band"),
    HopperRow(128, "prefill", Tiles(128, 128, 4, 2, consumers=2)),
    HopperRow(128, "listed", Tiles(128, 128, 4, 2, consumers=2, persistent=True), shape="powers"),
    HopperRow(128, "listed", Tiles(128, 128, 4, 2, consumers=2)),
    HopperRow(128, "backward", Tiles(128, 64, 4, 4, consumers=2, block_q=64, partial_stages=3)),
    HopperRow(256, "prefill", Tiles(128, 64, 4, 2, consumers=2)),
    HopperRow(256, "listed", Tiles(128, 64, 4, 2, consumers=2)),
)
DECODE: dict[tuple[str, int], tuple[tuple[int, Tiles], ...]] = {
    ("sm90", 16): ((128, Tiles(16, 64, 4, 3)), (256, Tiles(16, 64, 4, 2)), (512, Tiles(16, 32, 8, 2))),
    ("sm100", 16): ((128, Tiles(16, 64, 4, 3)), (256, Tiles(16, 64, 4, 2)), (512, Tiles(16, 32, 8, 2))),
    ("sm80", 16): ((128, Tiles(16, 64, 4, 3)), (256, Tiles(16, 32, 4, 2)), (512, Tiles(16, 32, 8, 1))),
    ("gfx942", 16): ((128, Tiles(16, 64, 4, 1)), (512, Tiles(16, 32, 4, 1))),
    ("any", 32): ((128, Tiles(16, 32, 8, 2)), (256, Tiles(16, 16, 4, 2)), (512, Tiles(16, 16, 4, 1))),
    ("interpreter", 16): ((512, Tiles(16, 32, 4, 1)),),
    ("interpreter", 32): ((512, Tiles(16, 32, 4, 1)),),
}
# the gradient of query holds block_m queries, that of key and value block_m keys; the other side has block_n per step
BACKWARD: dict[tuple[str, int], tuple[tuple[int, Tiles], ...]] = {
    ("sm90", 16): ((64, Tiles(128, 64, 8, 2)), (128, Tiles(64, 64, 8, 2)), (256, Tiles(32, 32, 8, 1))),
    ("sm100", 16): ((128, Tiles(128, 64, 8, 2)), (256, Tiles(64, 32, 8, 1))),
    ("sm80", 16): ((64, Tiles(128, 32, 8, 2)), (128, Tiles(64, 32, 8, 2)), (256, Tiles(32, 32, 8, 1))),
    ("gfx942", 16): ((128, Tiles(64, 32, 4, 1)), (256, Tiles(32, 32, 4, 1))),
    ("gfx942", 32): ((128, Tiles(32, 16, 8, 1)), (256, Tiles(16, 16, 8, 1))),
    ("any", 32): ((64, Tiles(32, 32, 8, 1)), (128, Tiles(32, 16, 8, 1)), (256, Tiles(16, 16, 8, 1))),
    ("interpreter", 16): ((512, Tiles(32, 32, 4, 1)),),
    ("interpreter", 32): ((512, Tiles(32, 32, 4, 1)),),
}
# gradients of what is read by the distance of query and key: square tiles
DISTANCES: dict[tuple[str, int], tuple[tuple[int, Tiles], ...]] = {
    ("sm90", 16): ((64, Tiles(64, 64, 4, 3)), (128, Tiles(64, 64, 8, 2)), (256, Tiles(32, 32, 4, 2))),
    ("sm100", 16): ((64, Tiles(64, 64, 4, 3)), (128, Tiles(64, 64, 8, 2)), (256, Tiles(32, 32, 8, 1))),
    ("sm80", 16): ((64, Tiles(64, 64, 4, 2)), (128, Tiles(32, 32, 4, 2)), (256, Tiles(32, 32, 8, 1))),
    ("gfx942", 16): ((128, Tiles(32, 32, 4, 1)), (256, Tiles(32, 32, 4, 1))),
    ("any", 32): ((64, Tiles(32, 32, 4, 1)), (128, Tiles(32, 32, 4, 1)), (256, Tiles(16, 16, 4, 1))),
    ("interpreter", 16): ((512, Tiles(32, 32, 4, 1)),),
    ("interpreter", 32): ((512, Tiles(32, 32, 4, 1)),),
}
NARROW = 32  # key tiles narrower than this are slower than gathering
TABLES = {"prefill": PREFILL, "listed": PREFILL, "decode": DECODE, "backward": BACKWARD, "distances": DISTANCES}
# architectures without rows of their own use those of a relative with no more shared memory
RELATIVES = {"sm86": "sm80", "sm89": "sm80", "sm120": "sm80", "sm103": "sm100"}


def on_hopper(kind: Kind, head_dim: int, value_dim: int, rule: Any, multiple: bool) -> Tiles | None:
    """The tiles of a Gluon kernel; None if there is none. ``multiple``: the score is a multiple of the raw one."""
    width, shape = padded(max(head_dim, value_dim)), shape_of(rule)
    fitting = (row for row in HOPPER if width <= row.width and kind == row.kind and multiple >= row.multiple)
    return next((row.tiles for row in fitting if row.shape in (None, shape)), None)


def choose(kind: Kind, plan: Plan, arch: str, bits: int, head_dim: int, value_dim: int, rows: int = 0) -> Tiles:
    """The tiles for a kernel.

    Args:
        arch: "sm90", "gfx942", ..., or "interpreter".
        bits: of the dtype of query, key and value.
        rows: for decode, queries times heads of a group.
    """
    table = TABLES[kind]
    arch = RELATIVES.get(arch, arch)
    found = table.get((arch, bits)) or table.get(("any", bits)) or table["sm80", bits]
    width = padded(max(head_dim, value_dim))
    tiles = next(tiles for limit, tiles in found if width <= limit)
    if kind in ("prefill", "listed"):
        tiles = SPARSE.get((arch, bits, mask_kind(plan), width), tiles)
    if plan.sparsity.select is not None:
        return within_block(tiles, plan.sparsity.select.expand.block, plan.sparsity.select.expand.unit)
    blocks = blocks_of_choice(plan.spec) if kind != "decode" else None
    fitting = aligned(tiles, plan) if blocks is None else within_block(tiles, *blocks)
    fitting = beside_dropout(fitting) if plan.spec.dropout else fitting
    return replace(fitting, block_m=padded(rows), warps=tiles.warps) if kind == "decode" else fitting


def mask_kind(plan: Plan) -> str:
    """ "list": power-of-two blocks that tiles of 128 divide; "band": queries keep no keys far behind."""
    if plan.sparsity.select is not None:
        return "list" if plan.sparsity.select.expand.unit % 128 == 0 else "small list"
    powers, shape = tile_ranges(plan.spec.rule).powers, shape_of(plan.spec.rule)
    if powers is None:
        return shape
    return "list" if powers.block % 128 == 0 else "small list"


def shape_of(rule: Any) -> str:
    """ "powers": blocks at power-of-two distances; "band": queries keep no keys far behind; "dense"."""
    keys = tile_ranges(rule)
    if keys.powers is not None:
        return "powers"
    return "band" if keys.lower or keys.near_lower else "dense"


def within_block(tiles: Tiles, block: int, unit: int) -> Tiles:
    """Tiles whose queries lie within one block of queries that share a list.

    A key tile lies within one unit, unless units are very narrow: gathering several units into one tile took 1.6 times
    as long as tiles of 32 keys (H100, D 64, units of 32).
    """
    block_m = min(tiles.block_m, block)
    block_n, stages = (unit, tiles.stages + 1) if NARROW <= unit < tiles.block_n else (tiles.block_n, tiles.stages)
    warps = tiles.warps if block_m >= 128 else min(tiles.warps, 4)
    return replace(tiles, block_m=block_m, block_n=block_n, warps=warps, stages=stages)


def aligned(tiles: Tiles, plan: Plan) -> Tiles:
    """Tiles that divide the blocks of the plan's power-of-two list, if it has one."""
    powers = tile_ranges(plan.spec.rule).powers
    if powers is None:
        return tiles
    divisor = powers.block & -powers.block
    if divisor < MIN_TILE:
        return tiles
    block_m, block_n = min(tiles.block_m, divisor), min(tiles.block_n, divisor)
    warps = tiles.warps if block_m >= 128 else min(tiles.warps, 4)
    return replace(tiles, block_m=block_m, block_n=block_n, warps=warps)


def beside_dropout(tiles: Tiles) -> Tiles:
    """Tiles of a kernel that draws which weights it keeps: random numbers take registers, too, for 32 keys at once."""
    return replace(tiles, block_n=min(tiles.block_n, max(tiles.block_n // 2, 32)))


def beside_captures(tiles: Tiles) -> Tiles:
    """Tiles of a backward that also computes gradients of captured tensors: a tile of them takes registers, too."""
    return replace(tiles, block_m=min(tiles.block_m, 64), block_n=max(tiles.block_n // 2, MIN_TILE))
