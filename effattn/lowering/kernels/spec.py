"""What an attention kernel is specialised on. Lengths, strides and scalars are arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effattn.ir.attention import AttentionSpec

Kind = Literal["prefill", "listed", "decode", "backward", "distances"]
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # torch's name -> Triton's
MAX_HEAD_DIM = 512
MIN_TILE = 16  # smallest side of a tile for tl.dot
DECODE_ROWS = 128  # most rows (queries times heads of a group) of a decode tile
DECODE_QUERIES = 16  # with more queries it is prefill


@dataclass(frozen=True)
class Tiles:
    """Sizes of a tile of the score matrix, and the schedule of the loop over key tiles."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    partial_stages: int = 0  # stages of the loop over partial tiles; 0: as ``stages``
    heads_together: int = 0  # heads that run side by side; 0: as many groups as have keys that fit in the L2 cache
    block_q: int = 0  # Gluon backward: queries of a tile that passes by; ``partial_stages`` of them are on their way
    consumers: int = 0  # warpgroups of 64 queries each, fed by a warp that copies: the Gluon dialect; 0: the Triton one
    programs: int = 1  # Gluon: programs that share a multiprocessor
    persistent: bool = False  # Gluon: as many programs as run at the same time, each takes one block after the other

    def __str__(self) -> str:
        programs = f"{self.consumers} consumer warpgroups" if self.consumers else f"{self.warps} warps"
        stay = ", persistent" if self.persistent else ""
        return f"{self.block_m} queries x {self.block_n} keys, {programs}, {self.stages} stages{stay}"


@dataclass(frozen=True)
class WantedGradient:
    """A captured tensor whose gradient a backward computes."""

    name: str
    owned: bool  # each element is read by one score at most, so that it is stored and not added up


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation; equal specs give equal source in any process."""

    kind: Kind
    form: str  # shown in the file's name and first lines
    attention: AttentionSpec
    dtype: str  # of query, key, value and out; torch's name: "bfloat16"
    head_dim: int
    value_dim: int
    groups: int  # query heads that share one key/value head
    tiles: Tiles
    tf32: bool = False  # fp32 products may round their inputs to TF32
    key_ranges: bool = True  # find the keys that data allow first, and visit only these
    list_block: int = 0  # queries that share a list of units; 0: tiles come by formula, and not from a list
    list_unit: int = 0  # consecutive keys per unit
    tests_data: bool = False  # listed by a selector: conditions on data are tested on every unit
    precise: bool = True  # tanh to single precision; else the chip's own, where the dialect has it
    wanted: tuple[WantedGradient, ...] = ()  # backward: captured tensors that need a gradient
    # backward: first tiles of keys that all later queries see, whose queries are therefore spread over programs
    long_tiles: int = 0
    wide: bool = False  # lengths or scalars may be large, so sums of them need 64 bits

    @property
    def block_d(self) -> int:
        """head_dim padded for tl.dot."""
        return padded(self.head_dim)

    @property
    def block_dv(self) -> int:
        return padded(self.value_dim)


def padded(size: int) -> int:
    """The next power of two that is a valid side of a tile."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())
