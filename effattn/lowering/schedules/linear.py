"""Tile sizes of linear attention by architecture, dtype and features: sizes that compile without spills.

The sm90 rows for 128 features are the fastest of 24 at 32,768 tokens on an H100; the others are not measured.
``benchmarks/linear_lightning.py --sweep`` times the candidates.
"""

from __future__ import annotations

from effattn.lowering.kernels.linear.spec import LinearKind, LinearTiles
from effattn.lowering.kernels.spec import padded
from effattn.lowering.schedules.attention import RELATIVES

# (architecture, bits of the dtype) -> rows (most padded features, tiles); the first row that fits is used
CHUNKS: dict[tuple[str, int], tuple[tuple[int, LinearTiles], ...]] = {
    ("sm90", 16): ((64, LinearTiles(64, 64, 4, 3)), (128, LinearTiles(64, 64, 4, 2)), (256, LinearTiles(32, 32, 8, 2))),
    ("sm100", 16): (
        (64, LinearTiles(64, 64, 4, 3)),
        (128, LinearTiles(64, 64, 8, 2)),
        (256, LinearTiles(64, 32, 8, 2)),
    ),
    ("sm80", 16): ((64, LinearTiles(32, 64, 4, 3)), (128, LinearTiles(32, 64, 8, 2)), (256, LinearTiles(32, 32, 8, 2))),
    ("gfx942", 16): ((128, LinearTiles(64, 64, 4, 1)), (256, LinearTiles(32, 32, 4, 1))),
    ("any", 32): ((64, LinearTiles(16, 32, 4, 1)), (128, LinearTiles(16, 16, 8, 1))),
    ("interpreter", 16): ((256, LinearTiles(16, 32, 4, 1)),),
    ("interpreter", 32): ((256, LinearTiles(16, 32, 4, 1)),),
}
# with a normaliser, the running sum of keys takes registers too
NORMALISED: dict[tuple[str, int], tuple[tuple[int, LinearTiles], ...]] = {
    ("sm90", 16): ((128, LinearTiles(64, 64, 8, 2)), (256, LinearTiles(32, 32, 8, 2))),
}
STEP = LinearTiles(1, 16, 4, 1)  # many small programs: a step is bound by reading and writing the state


def choose(kind: LinearKind, arch: str, bits: int, features: int, value_dim: int, ones: bool = False) -> LinearTiles:
    """The tiles for a kernel; ``arch`` as "sm90", "gfx942" or "interpreter"."""
    if kind == "step":
        return STEP
    arch = RELATIVES.get(arch, arch)
    found = NORMALISED.get((arch, bits)) if ones else None
    found = found or CHUNKS.get((arch, bits)) or CHUNKS.get(("any", bits)) or CHUNKS["sm80", bits]
    tiles = next(tiles for most, tiles in found if padded(features) <= most)
    return LinearTiles(tiles.chunk, min(tiles.block_dv, padded(value_dim)), tiles.warps, tiles.stages)
