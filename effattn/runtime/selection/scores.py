"""Score and Reduce in ATen: one number per list, query block and unit of keys, for some blocks at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.ir.plan import Plan
from effattn.ir.selector import KEY_HEADS, Last, Mean, Reduce, Score
from effattn.runtime.algebra import bindings, evaluate
from effattn.runtime.selection.vectors import indices, vectors

PRODUCTS = 2**23  # most products in memory at a time: 32 MiB in float32


class Scorer:
    """The scores of one call for one :class:`Score`. Larger is more important; -inf where no key is allowed."""

    def __init__(
        self, plan: Plan, score: Score, reduce: Reduce, query: Tensor, key: Tensor, captures, scalars, numbers
    ):
        """``query`` [B, Hq, Nq, D], ``key`` [B, Hkv, Nk, D]; the others as in ``effattn::attend``."""
        assert plan.sparsity.select is not None
        self.plan, self.score, self.reduce, self.expand = plan, score, reduce, plan.sparsity.select.expand
        self.q_len, self.k_len = query.shape[2], key.shape[2]
        self.names, self.captures = bindings(plan.spec, captures, scalars, numbers)
        self.pooled = key.shape[1] if score.lists == KEY_HEADS else score.lists
        self.query, self.key = query, vectors(key, score.key, self.pooled)
        self.lists = self.pooled or query.shape[1]

    def chunks(self, blocks: int) -> list[tuple[int, int]]:
        """Groups of query blocks (first, last) whose products fit in ``PRODUCTS``."""
        height = (
            1 if isinstance(self.score.query, Mean) else self.expand.block // getattr(self.score.query, "stride", 1)
        )
        row = self.key.shape[2] * self.query.shape[0] * self.lists * height
        step = max(PRODUCTS // max(row, 1), 1)
        return [(first, min(first + step, blocks)) for first in range(0, blocks, step)]

    @property
    def blocks(self) -> int:
        """Number of query blocks that are scored."""
        return 1 if isinstance(self.score.query, Last) else -(-self.q_len // self.expand.block)

    def of(self, first: int, last: int) -> Tensor:
        """Scores of the query blocks ``first <= m < last``: float32 [B, L, last - first, U]."""
        start, stop = first * self.expand.block, min(last * self.expand.block, self.q_len)
        if isinstance(self.score.query, Last):
            start, stop = 0, self.q_len
        query = vectors(self.query[:, :, start:stop], self.score.query, self.pooled)
        products = self._products(query)
        if not self.score.softmax:
            return products
        rows = indices(stop - start, self.score.query, products.device) + start
        logits = self._masked(products, rows)
        return self._reduced(logits, last - first)

    def _products(self, query: Tensor) -> Tensor:
        """[B, L, R, D] times key vectors [B, Lk, C, D]: float32 [B, L, R, C]."""
        groups = self.lists // self.key.shape[1]
        rows = query.unflatten(1, (-1, groups)).flatten(2, 3).float()
        return (rows @ self.key.float().transpose(-1, -2)).unflatten(2, (groups, -1)).flatten(1, 2)

    def _masked(self, products: Tensor, rows: Tensor) -> Tensor:
        """Log-probabilities of the allowed keys of each query, -inf elsewhere: [B, L, R, C]."""
        columns = indices(self.k_len, self.score.key, products.device)
        symbols: dict[str, Any] = {
            **self.names,
            "Nq": self.q_len,
            "Nk": self.k_len,
            "b": torch.arange(products.shape[0], device=products.device).view(-1, 1, 1, 1),
            "q": rows.view(-1, 1),
            "k": columns,
        }
        if self.lists != 1:
            symbols["h"] = torch.arange(self.lists, device=products.device).view(-1, 1, 1)
        device = products.device
        score = evaluate(self.plan.spec.score, {**symbols, "s": products}, self.captures, torch.float32, device)
        allowed = evaluate(self.plan.spec.predicate, symbols, self.captures, torch.float32, device)
        logits = score if isinstance(allowed, bool) and allowed else torch.where(allowed, score, -torch.inf)
        total = logits.logsumexp(dim=-1, keepdim=True)
        return logits - torch.where(total == -torch.inf, 0.0, total)

    def _reduced(self, logits: Tensor, blocks: int) -> Tensor:
        """[B, L, R, C] reduced to [B, L, blocks, U]."""
        stride = getattr(self.score.key, "stride", 1)
        width = self.expand.unit // stride
        cells = F.pad(logits, (0, -logits.shape[3] % width), value=-torch.inf).unflatten(3, (-1, width))
        if self.reduce.columns == "max":
            found = cells.amax(dim=-1)
        else:
            found = cells.exp().sum(dim=-1)
        if isinstance(self.score.query, Last):
            return found.amax(2, keepdim=True) if self.reduce.rows == "max" else found.mean(2, keepdim=True)
        height = self.expand.block // getattr(self.score.query, "stride", 1)
        fill = -torch.inf if self.reduce.columns == "max" else 0.0
        rows = F.pad(found, (0, 0, 0, blocks * height - found.shape[2]), value=fill).unflatten(2, (blocks, height))
        return rows.amax(dim=3) if self.reduce.rows == "max" else rows.mean(dim=3)
