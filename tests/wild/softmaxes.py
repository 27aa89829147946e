"""Other ways to weigh: kernels instead of a softmax, softmaxes of other axes, softmaxes written by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from language import CAUSAL, HEADS, INF, NO_PRODUCT, WIDTH
from row import Row, tokens
from torch import nn


def heads(packed):
    """Query, key and value [B, H, N, D] of what one layer made."""
    b, n, _ = packed.shape
    return (part.view(b, n, HEADS, 8).transpose(1, 2) for part in packed.chunk(3, -1))


class Performer(nn.Module):
    """Positive random features: no table of all pairs, nothing to replace."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("projection", torch.randn(6, 8))

    def features(self, x):
        u = torch.einsum("bhnd,md->bhnm", x * 8**-0.25, self.projection)
        norm = (x**2).sum(-1, keepdim=True) / 2 * 8**-0.5
        return torch.exp(u - norm - u.amax(dim=-1, keepdim=True).detach()) + 1e-4

    def forward(self, x):
        q, k, v = heads(self.qkv(x))
        q, k = self.features(q), self.features(k)
        d_inv = 1.0 / torch.einsum("bhnm,bhm->bhn", q, k.sum(dim=-2))
        context = torch.einsum("bhnm,bhne->bhme", k, v)
        return torch.einsum("bhme,bhnm,bhn->bhne", context, q, d_inv).transpose(1, 2).flatten(2)


class Efficient(nn.Module):
    """Shen et al.: a softmax of queries over features and of keys over positions, then two small products."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = heads(self.qkv(x))
        context = k.softmax(dim=-2).transpose(-1, -2) @ v
        return (q.softmax(dim=-1) @ context).transpose(1, 2).flatten(2)


class Bahdanau(nn.Module):
    """Additive attention: a small network scores each pair."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.v = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(8, 1)

    def forward(self, x):
        scores = self.v(torch.tanh(self.w1(x)[:, :, None] + self.w2(x)[:, None])).squeeze(-1)
        return scores.softmax(-1) @ x


class Linformer(nn.Module):
    """Keys and values projected along the text."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj_k, self.proj_v = (nn.Parameter(torch.randn(13, 5)) for _ in range(2))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = torch.einsum("bnd,nk->bkd", k, self.proj_k), torch.einsum("bnd,nk->bkd", v, self.proj_v)
        q, k, v = (t.reshape(b, -1, HEADS, 8).transpose(1, 2) for t in (q, k, v))
        attn = torch.einsum("bhnd,bhkd->bhnk", q, k * 0.35).softmax(dim=-1)
        return torch.einsum("bhnk,bhkd->bhnd", attn, v).transpose(1, 2).reshape(b, n, -1)


class SetTransformer(nn.Module):
    """Lee et al.: heads are split off the width and stacked in the batch."""

    def __init__(self):
        super().__init__()
        self.fc_q, self.fc_k, self.fc_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        q, k, v = self.fc_q(x), self.fc_k(x), self.fc_v(x)
        q, k, v = (torch.cat(t.split(8, 2), 0) for t in (q, k, v))
        weights = torch.softmax(q.bmm(k.transpose(1, 2)) / math.sqrt(WIDTH), 2)
        return torch.cat((q + weights.bmm(v)).split(x.size(0), 0), 2)


class OffByOne(nn.Module):
    """Softmax with one more in the denominator, as a column of zeros."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = heads(self.qkv(x))
        scores = F.pad(q @ k.transpose(-1, -2) * 0.35, (0, 1))
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2)


class ByHand(nn.Module):
    """The softmax itself written out."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.qkv = how, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        n = x.shape[1]
        q, k, v = heads(self.qkv(x))
        scores = q @ k.transpose(-1, -2) * 0.35
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -INF)
        if self.how == "exp":
            weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            weights = weights / weights.sum(dim=-1, keepdim=True)
        elif self.how == "max":
            weights = (scores - scores.max(dim=-1, keepdim=True).values.detach()).exp()
            weights = weights.div(torch.sum(weights, -1, True))
        elif self.how == "unsafe":
            weights = scores.exp()
            weights = weights / weights.sum(dim=-1, keepdim=True)
        elif self.how == "returned":
            weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            weights = weights / weights.sum(dim=-1, keepdim=True)
            return (weights @ v).transpose(1, 2).flatten(2), weights
        elif self.how == "logsumexp":
            weights = torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))
        else:
            weights = torch.special.softmax(scores, -1)
        return (weights @ v).transpose(1, 2).flatten(2)


ROWS = [
    Row(Performer, tokens(), ()),
    Row(Efficient, tokens(), (), missed=(NO_PRODUCT, NO_PRODUCT)),
    Row(Bahdanau, tokens(), (), missed=("sums of query and key",)),
    Row(Linformer, tokens(), symbolic=(0,)),
    Row(SetTransformer, tokens()),
    Row(OffByOne, tokens()),
    Row(lambda: ByHand("exp"), tokens(), CAUSAL, name="softmax-by-exp"),
    Row(lambda: ByHand("logsumexp"), tokens(), CAUSAL, name="softmax-by-logsumexp"),
    Row(lambda: ByHand("max"), tokens(), CAUSAL, name="softmax-by-max"),
    Row(lambda: ByHand("unsafe"), tokens(), CAUSAL, name="softmax-without-max"),
    Row(lambda: ByHand("returned"), tokens(), (), missed=("the attention weights are used",), name="softmax-returned"),
    Row(lambda: ByHand("special"), tokens(), CAUSAL, name="softmax-special"),
]
