"""What one generated kernel of linear attention is specialised on. Lengths, strides and scales are arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effattn.lowering.kernels.spec import padded

LinearKind = Literal["chunks", "whole", "step"]
# features of a head, by Triton's dtype: a state of so many rows still fits in the registers of a program
MAX_FEATURES = {"bf16": 256, "fp16": 256, "fp32": 128}
MAX_VALUE_DIM = 512
STEP_TOKENS = 16  # more tokens than this are no step


@dataclass(frozen=True)
class LinearTiles:
    """Sizes of what a program holds: ``chunk`` tokens, and the state of ``block_dv`` value columns."""

    chunk: int
    block_dv: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"chunks of {self.chunk}, {self.block_dv} value columns, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class LinearSpec:
    """One specialisation. Equal specs give equal source, in any process.

    ``kind``: "chunks" is causal, over many tokens; "whole" sees every key; "step" takes a few tokens one by one.
    """

    kind: LinearKind
    dtype: str  # of query, key and value, as in torch: "bfloat16"
    features: int
    value_dim: int
    tiles: LinearTiles
    query_groups: int = 1  # heads that share one query head
    key_groups: int = 1  # heads that share one key/value head; one of the two is 1
    shared: bool = False  # heads of a group share their states as well: no decay, no initial state
    decay: bool = False
    ones: bool = False  # a column of ones beside value, to divide by
    reverse: bool = False  # time runs from the last token to the first
    tf32: bool = False  # fp32 products may round their inputs to TF32

    @property
    def block_f(self) -> int:
        """Features padded to what tl.dot takes."""
        return padded(self.features)

    @property
    def width(self) -> int:
        """Columns of a state."""
        return self.value_dim + self.ones

    @property
    def value_tiles(self) -> int:
        return -(-self.value_dim // self.tiles.block_dv)
