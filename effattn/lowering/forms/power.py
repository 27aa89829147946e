"""Power: a window of blocks, blocks at power-of-two distances, and sink blocks (PowerAttention)."""

from __future__ import annotations

import sympy
from pydantic import Field, model_validator

from effattn.ir.expr import FloorDiv, IsPowerOfTwo, Nk, k, q
from effattn.ir.site import Site
from effattn.lowering.forms.form import (
    CAUSAL,
    FROM_THE_FIRST_KEY,
    SINKS_ON_PADDING,
    Form,
    Params,
    first_key,
    is_sink,
)


class PowerParams(Params):
    """Lengths in tokens. Equals exact attention while Nk <= window + block."""

    block: int = Field(default=128, ge=16, description="size of a block; a power of two")
    window: int = Field(default=2048, ge=1, description="recent tokens, in whole blocks, including the query's own")
    sinks: int = Field(default=128, ge=0, description="first tokens, which every query sees")

    @model_validator(mode="after")
    def _whole_blocks(self):
        if self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two, got {self.block}")
        if self.window % self.block:
            raise ValueError(f"window must be a multiple of block ({self.block}), got {self.window}")
        return self


def keep(params: PowerParams, site: Site):
    first = first_key(site)
    # blocks of a document are counted from its first key; behind padding they stay where tiles are
    start = first if first.has(q) else sympy.Integer(0)
    assert site.position is not None  # the rule CAUSAL
    distance = FloorDiv(site.position - start, params.block) - FloorDiv(k - start, params.block)
    near = distance < params.window // params.block
    return sympy.Or(near, IsPowerOfTwo(distance), is_sink(params.sinks, site))


def reference(params: PowerParams, q_index, k_index):
    """bool [Nq, Nk], without causality; arXiv 2503.03588 section 3, distances in blocks."""
    distance = q_index // params.block - k_index // params.block
    window = distance < params.window // params.block
    power = (distance & (distance - 1)) == 0
    return window | power | (k_index < params.sinks)


def kept_keys(params: PowerParams):
    window_blocks = params.window // params.block
    far = sympy.ceiling(sympy.Max(0, sympy.log(sympy.Max(1, Nk / (params.block * window_blocks)), 2)))
    return sympy.Min(Nk, params.window + params.sinks + params.block * far)


POWER = Form(
    name="power",
    kind="trained",
    summary="window, blocks at power-of-two distances, sinks: O(N log N), every token reachable in log N layers",
    source="Chen et al., PowerAttention, arXiv 2503.03588",
    params=PowerParams,
    rules=(CAUSAL, FROM_THE_FIRST_KEY, SINKS_ON_PADDING),
    keep=keep,
    kept_keys=kept_keys,
    reference=reference,
)
