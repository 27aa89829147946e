"""DHSA: chunks of keys are scored by their means, and each query block takes the best within a budget.

Two systems have this name (arXiv 2510.24606). ``unit = 1`` is the first: keys are cut into chunks, all heads share one
list, and the budget counts single tokens. A larger ``unit`` is the second: fixed blocks of ``unit`` keys, a list per
head, and a share of all blocks.

Three flaws of the published code are fixed: only keys allowed by causality are ranked (a query could be left without
keys), no key is listed twice (the inserted first tokens could be, and then counted twice in the softmax), and ties go
to the later key (all tokens of a chunk have the same score, so the choice was arbitrary).
"""

from __future__ import annotations

import itertools
import os
from typing import ClassVar, Literal

import sympy
import torch
from pydantic import Field, model_validator

from effattn.errors import WeightsError
from effattn.ir.expr import Nk, Nq
from effattn.ir.refusal import Why
from effattn.ir.selector import Chunks, Expand, Mean, Pick, Reduce, Score, Selector, Tokens, TopFraction, Trained
from effattn.ir.site import Layout, Site
from effattn.lowering.cost import CHOICE, Work
from effattn.lowering.forms import boundary_weights
from effattn.lowering.forms.form import (
    CAUSAL,
    FROM_THE_START,
    NO_DROPOUT,
    ONLY_CAUSAL,
    PLAIN_SCORE,
    PREFILL,
    Form,
    Params,
    Rule,
)
from effattn.lowering.forms.tensor_file import digest_of

HIDDEN = 256  # hidden size of the predictor, for costs


class DhsaParams(Params):
    """Lengths in tokens. Equals exact attention at ``share`` 1 (blocks) or ``budget`` >= Nk (tokens)."""

    block: int = Field(default=128, ge=16, description="queries that share a list; a power of two")
    unit: int = Field(default=32, ge=1, description="keys per block; 1: chunks, from which single tokens are taken")
    share: float = Field(default=0.125, gt=0, le=1, description="share of all blocks that a query keeps (unit > 1)")
    budget: int = Field(default=2048, ge=1, description="tokens that a query keeps (unit = 1)")
    chunks: Literal["fixed", "dip", "trained", "given"] = Field(
        default="fixed",
        description="how keys are cut (unit = 1): every ``chunk`` keys, where keys change, by a trained predictor, or "
        "by the caller",
    )
    chunk: int = Field(default=64, ge=1, description='size of a chunk with chunks = "fixed"')
    threshold: float = Field(default=0.9, ge=-1, le=1, description='cosine similarity below which "dip" cuts')
    files: ClassVar[tuple[str, ...]] = ("weights",)
    weights: str = Field(default="", description='safetensors file of the predictor for chunks = "trained"')
    logit: float = Field(default=1.1, description='predictor logit above which "trained" cuts')
    local: int = Field(default=128, ge=0, description="most recent tokens, always kept")
    sinks: int = Field(default=128, ge=0, description="first tokens, always kept")

    @model_validator(mode="after")
    def _sizes(self):
        for name in ("block", "unit"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.unit > 1 and self.unit < 16:
            raise ValueError(f"unit must be 1 or at least 16, got {self.unit}")
        if self.unit == 1 and self.local < self.block:
            raise ValueError(f"local must be at least block ({self.block}), so that no row is empty; got {self.local}")
        if self.unit == 1 and self.budget < self.local + self.sinks:
            raise ValueError(f"budget must hold local and sinks ({self.local} + {self.sinks}), got {self.budget}")
        if (self.chunks == "trained") != bool(self.weights):
            raise ValueError('chunks = "trained" and weights belong together: set both, or neither')
        if self.chunks == "trained" and self.unit > 1:
            raise ValueError(f'chunks = "trained" selects single tokens: unit must be 1, got {self.unit}')
        return self


def select(params: DhsaParams, site: Site) -> Selector:
    if params.unit > 1:
        score = Score(query=Mean(size=params.block), key=Mean(size=params.unit))
        return Selector(
            score=score,
            reduce=Reduce(),
            pick=Pick(budget=TopFraction(share=params.share), sinks=params.sinks, local=params.local),
            expand=Expand(block=params.block, unit=params.unit),
        )
    return Selector(
        score=Score(query=Mean(size=params.block, root_length=True), key=_chunks(params, site.layer), lists=1),
        reduce=Reduce(),
        pick=Pick(budget=Tokens(tokens=params.budget), sinks=params.sinks, local=params.local),
        expand=Expand(block=params.block, unit=1),
    )


def _chunks(params: DhsaParams, layer: int | None) -> Mean | Chunks | Trained:
    """How keys are cut if single tokens are taken."""
    if params.chunks == "fixed":
        return Mean(size=params.chunk, root_length=True)
    if params.chunks == "trained":
        path = os.path.abspath(params.weights)
        return Trained(weights=path, digest=digest_of(path), layer=layer, threshold=params.logit, block=params.block)
    return Chunks(find=params.chunks, threshold=params.threshold)


def reference(params: DhsaParams, query, key, allowed, scale, bounds=None):
    """bool [B, H, Nq, Nk], in float64. ``bounds``: chunk boundaries from 0 to Nk; None: every ``chunk`` keys."""
    batch, heads, q_len, _ = query.shape
    k_len, block = key.shape[2], params.block
    query, key = query.double(), key.double().repeat_interleave(heads // key.shape[1], 1)
    kept = torch.zeros(batch, heads, q_len, k_len, dtype=torch.bool)
    bounds = bounds or [*range(0, k_len, params.chunk), k_len]
    for start in range(0, q_len, block):
        stop = min(start + block, q_len)
        first, limit = start + k_len - q_len, stop + k_len - q_len
        if limit <= 0:
            continue
        rows = query[:, :, start:stop]
        if params.unit == 1:
            mean = rows.mean((1, 2)) * (stop - start) ** 0.5
            scores = torch.full((batch, k_len), -torch.inf, dtype=torch.float64)
            for low, high in itertools.pairwise(bounds):
                chunk = key[:, :, low:high].mean((1, 2)) * (high - low) ** 0.5
                scores[:, low:high] = (mean * chunk).sum(-1, keepdim=True)
            scores[:, : params.sinks] = torch.inf
            scores[:, max(limit - params.local, 0) :] = torch.inf
            scores = scores[:, :limit]
            order = limit - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
            for b in range(batch):
                kept[b, :, start:stop, order[b, : min(params.budget, limit)]] = True
            continue
        unit, units = params.unit, -(-k_len // params.unit)
        seen = (limit - 1) // unit + 1
        means = torch.stack([part.mean(2) for part in key.split(unit, 2)], 2)[:, :, :seen]
        scores = (rows.mean(2, keepdim=True) * means).sum(-1)
        scores[:, :, : -(-params.sinks // unit)] = 1e30
        scores[:, :, max(seen - -(-params.local // unit), 0) :] = 1e30
        scores[:, :, max(first, 0) // unit :] = torch.inf
        order = seen - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
        count = max(int(params.share * units), 1, int((scores[0, 0] >= 1e30).sum()))
        for b in range(batch):
            for h in range(heads):
                for one in order[b, h, :count].tolist():
                    kept[b, h, start:stop, one * unit : (one + 1) * unit] = True
    return kept


def kept_keys(params: DhsaParams):
    if params.unit == 1:
        return sympy.Min(Nk, params.budget)
    return sympy.Min(Nk, sympy.Max(params.share * Nk, params.sinks + params.local + params.block))


def selector_work(params: DhsaParams, sizes: Layout, element: int) -> Work:
    """Block means, one product of them, and a selection per query block."""
    heads, kv_heads = sizes.batch * sizes.heads, sizes.batch * sizes.kv_heads
    lists = heads if params.unit > 1 else sizes.batch
    cells = lists * (Nq / params.block) * (Nk / (params.unit if params.unit > 1 else params.chunk))
    vectors = heads * Nq + kv_heads * Nk
    products = 2 * sizes.head_dim * cells
    if params.chunks == "trained":
        channels = sizes.kv_heads * sizes.head_dim
        products += sizes.batch * Nk * (22 * channels**2 + 2 * HIDDEN * (4 * channels + 1))
    return Work(products, element * sizes.head_dim * vectors + (12 + CHOICE) * cells, launches=24)


BOUNDARIES = Rule(
    Why.BOUNDARIES,
    lambda site, params: params.unit > 1 or params.chunks != "given",
    "a model's graph has no chunk boundaries",
    "pass them to effattn.attention(..., boundaries=...), or choose another value of chunks",
)


def _weights_problem(site: Site, params: DhsaParams) -> str | None:
    if params.chunks != "trained":
        return None
    path = os.path.abspath(params.weights)
    try:
        digest = digest_of(path)
    except WeightsError as error:
        return str(error)
    layout = site.layout
    return boundary_weights.problem(path, digest, site.layer, int(layout.kv_heads), int(layout.head_dim))


WEIGHTS = Rule(
    Why.PREDICTOR,
    lambda site, params: _weights_problem(site, params) is None,
    "the predictor's weights cannot be read, or do not fit this attention",
    'see docs/forms.md for what the file holds, or let chunks be found without training (chunks = "dip")',
    reason=_weights_problem,
)

DHSA = Form(
    name="dhsa",
    kind="approximate",
    summary="chunks of keys ranked by their means: the best within a budget, recent keys and sinks",
    source="Xiong et al., Dynamic Hierarchical Sparse Attention, arXiv 2510.24606",
    params=DhsaParams,
    rules=(CAUSAL, ONLY_CAUSAL, PREFILL, PLAIN_SCORE, FROM_THE_START, BOUNDARIES, WEIGHTS, NO_DROPOUT),
    kept_keys=kept_keys,
    select=select,
    selector_work=selector_work,
    reference=reference,
)
