"""Positions in the scores: ALiBi, learned and relative biases, disentangled attention, biases of pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from language import CAUSAL, HEADS, LONGEST, WIDTH, padded
from row import Row, tokens
from torch import nn


class AlibiMpt(nn.Module):
    """MosaicML: a bias over keys, sliced to the lengths, then a causal mask of the larger length."""

    def __init__(self):
        super().__init__()
        self.Wqkv = nn.Linear(WIDTH, 3 * WIDTH)
        bias = torch.arange(1 - LONGEST, 1, dtype=torch.int32).view(1, 1, 1, LONGEST)
        slopes = 1.0 / torch.pow(2, torch.arange(1, HEADS + 1).float().mul(8 / HEADS)).view(1, HEADS, 1, 1)
        self.register_buffer("attn_bias", bias * slopes, persistent=False)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, 8).transpose(1, 2) for t in self.Wqkv(x).chunk(3, dim=2))
        attn_weight = q.matmul(k.transpose(2, 3)) * 8**-0.5
        s_q, s_k = q.size(-2), k.size(-2)
        bias = self.attn_bias[:, :, max(0, self.attn_bias.size(2) - s_q) :, max(0, self.attn_bias.size(3) - s_k) :]
        attn_weight = attn_weight + bias
        s = max(s_q, s_k)
        causal_mask = attn_weight.new_ones(s, s, dtype=torch.float32).tril().to(torch.bool).logical_not()
        causal_mask = causal_mask[-s_q:, -s_k:]
        attn_weight = attn_weight.masked_fill(causal_mask.view(1, 1, s_q, s_k), torch.finfo(q.dtype).min)
        return torch.softmax(attn_weight, dim=-1).to(v.dtype).matmul(v).transpose(1, 2).flatten(2)


def alibi_of_mask(attention_mask):
    """BLOOM and Falcon: positions are counted by the padding mask; [batch * heads, 1, length]."""
    batch, length = attention_mask.shape
    slopes = torch.pow(torch.tensor(2 ** (-(2 ** -(math.log2(HEADS) - 3)))), torch.arange(1, 1 + HEADS))
    places = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
    return (slopes[..., None] * places).reshape(batch * HEADS, 1, length)


class AlibiBloom(nn.Module):
    """BigScience: baddbmm as a method of the bias, one dimension for batch and heads."""

    def __init__(self):
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, attention_mask):
        batch, length, _ = x.shape
        fused = self.query_key_value(x).view(batch, length, HEADS, 3, 8)
        q, k, v = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        q = q.transpose(1, 2).reshape(batch * HEADS, length, 8)
        k = k.permute(0, 2, 3, 1).reshape(batch * HEADS, 8, length)
        v = v.transpose(1, 2).reshape(batch * HEADS, length, 8)
        alibi = alibi_of_mask(attention_mask)
        scores = alibi.baddbmm(batch1=q, batch2=k, beta=1.0, alpha=8**-0.5).view(batch, HEADS, length, length)
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        mask = causal | (attention_mask == 0)[:, None, None, :]
        weights = torch.masked_fill(scores, mask, torch.finfo(scores.dtype).min)
        probs = F.softmax(weights, dim=-1, dtype=torch.float32).to(x.dtype).view(batch * HEADS, length, length)
        context = torch.bmm(probs, v).view(batch, HEADS, length, 8).permute(0, 2, 1, 3)
        return context.reshape(batch, length, WIDTH)


class AlibiFalcon(nn.Module):
    """TII: one key head, the bias added before the scale, a mask of -1e9 as floats."""

    def __init__(self):
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, WIDTH + 16)

    def forward(self, x, attention_mask):
        batch, length, _ = x.shape
        fused = self.query_key_value(x).view(batch, length, HEADS + 2, 8)
        q, k, v = fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]
        q = q.transpose(1, 2).reshape(batch, HEADS, length, 8)
        k, v = (t.transpose(1, 2).reshape(batch, 1, length, 8) for t in (k, v))
        alibi = alibi_of_mask(attention_mask)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        hidden = hidden | ~attention_mask.bool()[:, None, None, :]
        floats = (hidden * 1.0).masked_fill(hidden, -1e9).to(q.dtype)
        scores = (q @ k.transpose(-1, -2)).view(batch, HEADS, length, length)
        probs = F.softmax((scores + alibi.view(batch, HEADS, 1, -1)) * 8**-0.5 + floats, dim=-1, dtype=x.dtype)
        return (probs @ v).permute(0, 2, 1, 3).reshape(batch, length, WIDTH)


class T5(nn.Module):
    """Mesh TensorFlow's buckets of distances, a learned number for each bucket and head, no scale."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.bias = nn.Embedding(8, HEADS)

    @staticmethod
    def bucket(relative, buckets: int = 8, furthest: int = 20):
        buckets //= 2
        found = (relative > 0).to(torch.long) * buckets
        relative = torch.abs(relative)
        exact = buckets // 2
        large = exact + (torch.log(relative.float() / exact) / math.log(furthest / exact) * (buckets - exact)).to(
            torch.long
        )
        large = torch.min(large, torch.full_like(large, buckets - 1))
        return found + torch.where(relative < exact, relative, large)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, -1, HEADS, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(3, 2))
        places = torch.arange(n)
        values = self.bias(self.bucket(places[None, :] - places[:, None]))
        scores += values.permute([2, 0, 1]).unsqueeze(0)
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        return self.o(torch.matmul(weights, v).transpose(1, 2).contiguous().view(b, -1, WIDTH))


class Deberta(nn.Module):
    """Content to position and position to content: products with tables, gathered by distance."""

    def __init__(self):
        super().__init__()
        self.qkv, self.places = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(1, HEADS, 2 * LONGEST, 8))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        i = torch.arange(n)
        index = (i[:, None] - i[None, :] + LONGEST).expand(b, HEADS, n, n)
        c2p = torch.gather(q @ self.places.transpose(-1, -2), -1, index)
        p2c = torch.gather(k @ self.places.transpose(-1, -2), -1, index).transpose(-1, -2)
        probs = ((q @ k.transpose(-1, -2) + c2p + p2c) / math.sqrt(24)).softmax(-1)
        return (probs @ v).transpose(1, 2).reshape(b, n, -1)


class TransformerXl(nn.Module):
    """The relative shift: a product with embedded distances, moved by a reshape."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.r, self.u, self.w = (nn.Parameter(torch.randn(*s)) for s in ((13, HEADS, 8), (HEADS, 8), (HEADS, 8)))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, 8) for t in self.qkv(x).chunk(3, -1))
        ac = torch.einsum("bind,bjnd->bnij", q + self.u, k)
        bd = torch.einsum("bind,jnd->bnij", q + self.w, self.r)
        padded = F.pad(bd, (1, 0)).view(b, HEADS, n + 1, n)
        bd = padded[:, :, 1:].view_as(bd)
        scores = (ac + bd) * 0.35
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool()[None, None], -1e30)
        return torch.einsum("bnij,bjnd->bind", scores.softmax(-1), v).flatten(2)


class PairBias(nn.Module):
    """AlphaFold: two batch dimensions, a mask and a bias of pairs that is shared by one of them, a gate."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.pair = nn.Linear(6, HEADS, bias=False)

    def forward(self, m, z, mask):
        q, k, v = (layer(m).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for layer in (self.q, self.k, self.v))
        q = q / math.sqrt(8)
        biases = [1e9 * (mask[..., None, None, :] - 1), self.pair(z).permute(0, 3, 1, 2).unsqueeze(-4)]
        a = torch.matmul(q, k.transpose(-1, -2))
        for bias in biases:
            a += bias
        out = torch.matmul(F.softmax(a, dim=-1), v).transpose(-2, -3)
        return (out * torch.sigmoid(self.g(m)).unflatten(-1, (HEADS, -1))).flatten(-2)


def alignment():
    """Sequences of an alignment, pairs of residues, and which residues there are."""
    seen = torch.arange(5) < torch.tensor([[5] * 3, [4, 5, 2]])[..., None]
    return torch.randn(2, 3, 5, WIDTH), torch.randn(2, 5, 5, 6), seen.float()


ROWS = [
    Row(
        AlibiMpt, tokens(), score="Where(0 < k - q, -3.4028235e+38, 0.35355339*s + bias[0, h, 0, 11 + k])", train=False
    ),
    Row(AlibiBloom, padded(), "k <= q & padding[b, k]", score="slopes[h]"),
    Row(AlibiFalcon, padded(), "true", score="bias3[b, 0, q, k]"),  # its fill is a number that rounding tells apart,
    Row(T5, tokens(), "true", score="bias"),
    Row(Deberta, tokens(), score="bias2[b, h, k, 24 + k - q]"),
    Row(TransformerXl, tokens(), CAUSAL, score="bias[b, h, "),
    Row(PairBias, alignment, score="bias", symbolic=(0,)),
]
