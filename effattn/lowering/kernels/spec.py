"""What one generated kernel is specialised on. Everything else (lengths, strides, scalars) is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effattn.ir.attention import AttentionSpec

Kind = Literal["prefill", "listed", "decode", "backward"]
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # torch's name -> Triton's
MAX_HEAD_DIM = 512
MIN_TILE = 16  # tl.dot takes no smaller side
DECODE_ROWS = 128  # query rows times group members that one decode tile may hold
DECODE_QUERIES = 16  # more query rows than this are prefill


@dataclass(frozen=True)
class Tiles:
    """Sizes of a tile of the score matrix, and how the compiler is to schedule the loop over key tiles."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    partial_stages: int = 0  # stages of the loop over boundary tiles; 0: as ``stages``
    heads_together: int = 0  # heads whose tiles start side by side; 0: groups whose keys fit in the L2 cache together
    descriptors: bool = False  # load keys and values through tensor descriptors (TMA); needs aligned strides

    def __str__(self) -> str:
        text = f"{self.block_m} queries x {self.block_n} keys, {self.warps} warps, {self.stages} stages"
        return text + (", tensor descriptors" if self.descriptors else "")


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation. Equal specs give equal source, in any process."""

    kind: Kind
    form: str  # for people: the name of the file, and its first lines
    attention: AttentionSpec
    dtype: str  # of query, key, value and out, as in torch: "bfloat16"
    head_dim: int
    value_dim: int
    groups: int  # query heads that share one key/value head
    tiles: Tiles
    tf32: bool = False  # fp32 products may round their inputs to TF32
    key_ranges: bool = True  # find the keys that data allows first, and visit no others
    list_block: int = 0  # listed: rows that share a list of units
    list_unit: int = 0  # listed: consecutive keys of a unit
    wide: bool = False  # lengths or scalars may be large, so that sums of them need 64 bits

    @property
    def block_d(self) -> int:
        """Head dimension padded to what tl.dot takes."""
        return padded(self.head_dim)

    @property
    def block_dv(self) -> int:
        return padded(self.value_dim)


def padded(size: int) -> int:
    """The next power of two that a tile side may have."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())
