"""What a kernel of linear attention is specialised on. Lengths, strides and scales are arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effattn.lowering.kernels.spec import padded

LinearKind = Literal["chunks", "whole", "step"]
# most features of a head by Triton's dtype, so that a state fits in the registers of a program
MAX_FEATURES = {"bf16": 256, "fp16": 256, "fp32": 128}
MAX_VALUE_DIM = 512
STEP_TOKENS = 16  # most tokens of a decode step


@dataclass(frozen=True)
class LinearTiles:
    """What a program holds: ``chunk`` tokens, and the state of ``block_dv`` value columns."""

    chunk: int
    block_dv: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"chunks of {self.chunk}, {self.block_dv} value columns, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class LinearSpec:
    """One specialisation; equal specs give equal source in any process.

    ``kind``: "chunks" is causal, over many tokens; "whole" sees every key; "step" takes a few tokens one by one.
    """

    kind: LinearKind
    dtype: str  # of query, key and value; torch's name: "bfloat16"
    features: int
    value_dim: int
    tiles: LinearTiles
    query_groups: int = 1  # heads that share one query head
    key_groups: int = 1  # heads that share one key/value head; one of the two is 1
    shared: bool = False  # the heads of a group share their states: no decay, no initial state
    decay: bool = False
    ones: bool = False  # value gets a column of ones, the normaliser
    reverse: bool = False  # time runs from the last token to the first
    tf32: bool = False  # fp32 products may round their inputs to TF32

    @property
    def block_f(self) -> int:
        """Features padded for tl.dot."""
        return padded(self.features)

    @property
    def width(self) -> int:
        """Columns of a state."""
        return self.value_dim + self.ones

    @property
    def value_tiles(self) -> int:
        return -(-self.value_dim // self.tiles.block_dv)
