"""Attention of protein models: rows that share weights, weights that are averaged for nobody, MSA and structure."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from row import Row, tokens
from torch import nn

WIDTH, HEADS = 32, 4


class TiedRows(nn.Module):
    """MSA Transformer: one map of weights for all sequences of an alignment, [rows, columns, batch, width]."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        rows, columns, batch, width = x.shape
        scaling = (width // HEADS) ** -0.5 / rows**0.5
        q, k, v = (layer(x).view(rows, columns, batch, HEADS, -1) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("rinhd,rjnhd->hnij", q * scaling, k).softmax(-1)
        context = torch.einsum("hnij,rjnhd->rinhd", weights, v)
        return self.out(context.contiguous().view(rows, columns, batch, width))


class Columns(nn.Module):
    """The other axis of an alignment."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        rows, columns, batch, _ = x.shape
        q, k, v = (layer(x).view(rows, columns, batch, HEADS, -1) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("icnhd,jcnhd->hcnij", q * 0.35, k).softmax(-1)
        return torch.einsum("hcnij,jcnhd->icnhd", weights, v).reshape(x.shape)


class AveragedForNobody(nn.Module):
    """ESM-2: weights are averaged over heads whether the caller takes them or not."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def attention(self, x):
        length, batch, width = x.shape
        q, k, v = (
            layer(x).contiguous().view(length, batch * HEADS, width // HEADS).transpose(0, 1)
            for layer in (self.q, self.k, self.v)
        )
        scores = torch.bmm(q * 0.35, k.transpose(1, 2))
        weights = F.softmax(scores, dim=-1, dtype=torch.float32)
        out = torch.bmm(F.dropout(weights.type_as(scores), 0.1, self.training), v.type_as(scores))
        shown = weights.view(batch, HEADS, length, -1).type_as(out).transpose(1, 0).mean(dim=0)
        return out.transpose(0, 1).contiguous().view(length, batch, width), shown

    def forward(self, x):
        return self.attention(x.transpose(0, 1))[0].transpose(0, 1)


ROWS = [
    Row(TiedRows, tokens(3, 7, 2, WIDTH), symbolic=(1, 2)),
    Row(Columns, tokens(5, 3, 2, WIDTH), symbolic=(0,)),
    Row(AveragedForNobody, tokens()),
]
