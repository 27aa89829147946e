"""Proxy: pooled heads rank blocks once for a group of heads; each head takes its own share (ProxyAttn)."""

from __future__ import annotations

import sympy
import torch
from pydantic import Field, model_validator

from effattn.ir.expr import Nk, Nq
from effattn.ir.refusal import Why
from effattn.ir.selector import KEY_HEADS, Expand, Last, Pick, Reduce, Score, Selector, Strided, TopP
from effattn.ir.site import Layout, Site
from effattn.lowering.cost import CHOICE, Work
from effattn.lowering.forms.form import (
    CAUSAL,
    NO_DROPOUT,
    ONLY_CAUSAL,
    PLAIN_SCORE,
    PREFILL,
    SAME_MASK,
    Form,
    Params,
    Rule,
)


class ProxyParams(Params):
    """Lengths in tokens. Equals exact attention at ``gamma`` 1, and while Nk <= ``least``."""

    gamma: float = Field(default=0.95, gt=0, le=1, description="share of the last query block's mass each head keeps")
    groups: int = Field(
        default=0,
        ge=0,
        description="groups of heads that share a ranking, a divisor of the key heads; 0: one per key head",
    )
    stride: int = Field(default=32, ge=1, description="every stride-th query is scored, at least one per block")
    key_stride: int = Field(default=1, ge=1, description="every key_stride-th key is scored")
    block: int = Field(default=128, ge=16, description="size of a block; a power of two")
    least: int = Field(default=2048, ge=0, description="least number of tokens that a query keeps")

    @model_validator(mode="after")
    def _powers_of_two(self):
        for name in ("block", "stride", "key_stride"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.key_stride > self.block:
            raise ValueError(f"key_stride must be at most block ({self.block}), got {self.key_stride}")
        return self

    @property
    def rows_apart(self) -> int:
        """Distance between scored queries."""
        return min(self.stride, self.block)


def select(params: ProxyParams, site: Site) -> Selector:
    of_each_head = TopP(
        gamma=params.gamma,
        least=params.least,
        score=Score(query=Last(size=params.block), key=Strided(), softmax=True),
        reduce=Reduce(rows="mean", columns="sum"),
        ranks_last=True,
    )
    return Selector(
        score=Score(
            query=Strided(stride=params.rows_apart),
            key=Strided(stride=params.key_stride),
            lists=params.groups or KEY_HEADS,
            softmax=True,
        ),
        reduce=Reduce(rows="max", columns="max"),
        pick=Pick(budget=of_each_head, sinks=params.block),
        expand=Expand(block=params.block, unit=params.block),
    )


def reference(params: ProxyParams, query, key, allowed, scale):
    """bool [B, H, Nq, Nk], in float64, block by block. The diagonal and the first block are always kept.

    Choices that the paper leaves open: a block has 128 tokens, the diagonal and the first block are forced, a head has
    one budget for all queries, ties go to the later block, and the last query block, whose probabilities are all known,
    is ranked by them.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1], key.shape[2]
    query, key = query.double(), key.double()
    allowed = allowed.expand(batch, heads, q_len, k_len)
    block, offset = params.block, k_len - q_len
    units = -(-k_len // block)
    # 1. rank the blocks once per group of heads
    groups = params.groups or kv_heads
    pooled_q = query.view(batch, groups, -1, q_len, dim).mean(2)[:, :, :: params.rows_apart]
    pooled_k = key.view(batch, groups, -1, k_len, dim).mean(2)[:, :, :: params.key_stride]
    seen = allowed[:, :1, :: params.rows_apart, :: params.key_stride]
    logits = (pooled_q @ pooled_k.mT * scale).masked_fill(~seen, -torch.inf)
    shares = logits.softmax(-1).nan_to_num()
    # 2. the number of blocks each head needs to cover gamma of the mass of its last query block
    last = query[:, :, -block:] @ key.repeat_interleave(heads // kv_heads, 1).mT * scale
    mass = last.masked_fill(~allowed[:, :, -block:], -torch.inf).softmax(-1).nan_to_num().mean(2)
    by_unit = torch.stack([part.sum(-1) for part in mass.split(block, -1)], -1)
    covered = by_unit.sort(-1, descending=True).values.cumsum(-1)
    needed = (covered < params.gamma * covered[..., -1:]).sum(-1) + 1
    needed = needed.clamp(-(-params.least // block), units) if params.gamma < 1 else torch.full_like(needed, units)
    # 3. each query block keeps its own blocks, the first one, and the best of the others
    kept = torch.zeros(batch, heads, q_len, k_len, dtype=torch.bool)
    cells = block // params.key_stride
    for start in range(0, q_len, block):
        stop = min(start + block, q_len)
        first, last_unit = max(start + offset, 0) // block, (stop - 1 + offset) // block
        if stop - 1 + offset < 0:
            continue
        rows = shares[:, :, start // params.rows_apart : -(-stop // params.rows_apart)]
        best = torch.stack([part.amax((-1, -2)) for part in rows.split(cells, -1)], -1)[..., : last_unit + 1]
        if stop == q_len:
            best = by_unit.unflatten(1, (groups, -1)).amax(2)[..., : last_unit + 1]
        best[..., 0] = 2.0
        best[..., first:] = 3.0
        order = last_unit - best.flip(-1).argsort(dim=-1, descending=True, stable=True)
        least = last_unit - first + 1 + (first > 0)
        for b in range(batch):
            for h in range(heads):
                taken = order[b, h * groups // heads, : max(int(needed[b, h]), least)]
                for unit in taken.tolist():
                    kept[b, h, start:stop, unit * block : (unit + 1) * block] = True
    return kept


GROUPS = Rule(
    Why.GROUPS,
    lambda site, params: params.groups == 0 or int(site.layout.kv_heads) % params.groups == 0,
    "the number of key heads is not divisible by groups",
    "choose a divisor of the number of key heads, or 1",
)

ASSUMED_SHARE = 0.25  # of the keys; the share that gamma 0.95 keeps depends on the data


def selector_work(params: ProxyParams, sizes: Layout, element: int) -> Work:
    """Both passes, over pooled heads and over the last queries, compute their products twice."""
    heads, kv_heads = sizes.batch * sizes.heads, sizes.batch * sizes.kv_heads
    groups = params.groups or sizes.kv_heads
    ranking = 2 * sizes.batch * groups * sizes.head_dim * Nq * Nk / (params.rows_apart * params.key_stride)
    mass = 4 * heads * params.block * sizes.head_dim * Nk
    vectors = heads * Nq / params.rows_apart + kv_heads * Nk / params.key_stride + 2 * kv_heads * Nk
    cells = (12 * sizes.batch * groups + CHOICE * heads) * Nq * Nk / params.block**2
    return Work(ranking + mass, element * sizes.head_dim * vectors + cells, launches=24)


PROXY = Form(
    name="proxy",
    kind="approximate",
    summary="blocks ranked by pooled heads on few queries; each head takes as many as cover its last queries' mass",
    source="Wang et al., ProxyAttn, arXiv 2509.24745",
    params=ProxyParams,
    rules=(CAUSAL, ONLY_CAUSAL, PREFILL, PLAIN_SCORE, SAME_MASK, GROUPS, NO_DROPOUT),
    kept_keys=lambda params: sympy.Min(Nk, sympy.Max(params.least, ASSUMED_SHARE * Nk)),
    select=select,
    selector_work=selector_work,
    reference=reference,
)
