"""Attention of language models that is more than softmax of products: sinks, mixed heads, differences, latent keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from language import CAUSAL, HEADS, INF, WIDTH, padded
from row import Row, tokens
from torch import nn


class XTransformers(nn.Module):
    """lucidrains: einsum, one key head for all, memory keys in front, a causal mask that starts at the diagonal."""

    def __init__(self, one_kv_head: bool, memories: int = 0, talking: str = "", sink: bool = False):
        super().__init__()
        self.memories, self.one, self.talking = memories, one_kv_head, talking
        kv = 8 if one_kv_head else WIDTH
        self.to_q, self.to_k, self.to_v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, kv), nn.Linear(WIDTH, kv)
        if memories:
            self.mem_k, self.mem_v = (nn.Parameter(torch.randn(HEADS, memories, 8)) for _ in range(2))
        self.sink = nn.Parameter(torch.randn(HEADS)) if sink else None
        if talking:
            self.mix = nn.Linear(HEADS, HEADS) if talking == "linear" else nn.Conv2d(HEADS, HEADS, 1, bias=False)

    def forward(self, x, mask=None):
        b, n, _ = x.shape
        q = self.to_q(x).view(b, n, HEADS, 8).transpose(1, 2)
        k, v = self.to_k(x), self.to_v(x)
        if not self.one:
            k, v = (t.view(b, n, HEADS, 8).transpose(1, 2) for t in (k, v))
        if self.memories:
            mem_k, mem_v = (t.unsqueeze(0).expand(b, -1, -1, -1) for t in (self.mem_k, self.mem_v))
            k, v = torch.cat((mem_k, k), dim=-2), torch.cat((mem_v, v), dim=-2)
            if mask is not None:
                mask = F.pad(mask, (self.memories, 0), value=True)
        kv_pattern = "b j d" if self.one else "b h j d"
        dots = torch.einsum(f"b h i d, {kv_pattern} -> b h i j", q, k) * 8**-0.5
        if self.talking == "einsum":
            dots = torch.einsum("b h i j, g h -> b g i j", dots, self.mix.weight[:, :, 0, 0])
        elif self.talking == "linear":
            dots = self.mix(dots.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.talking:
            dots = self.mix(dots)
        value = -torch.finfo(dots.dtype).max
        if mask is not None:
            dots = dots.masked_fill(~mask[:, None, None, :], value)
        i, j = dots.shape[-2:]
        causal = torch.ones((i, j), device=dots.device, dtype=torch.bool).triu(j - i + 1)
        dots = dots.masked_fill(causal, value)
        if self.sink is not None:
            dots = torch.cat((self.sink.view(1, HEADS, 1, 1).expand(b, -1, n, -1), dots), dim=-1)
        attn = F.softmax(dots, dim=-1, dtype=torch.float32).type(dots.dtype)
        if self.sink is not None:
            attn = attn[..., 1:]
        out = torch.einsum(f"b h i j, {kv_pattern} -> b h i d", attn, v)
        return out.transpose(1, 2).reshape(b, n, -1)


class LocalAttention(nn.Module):
    """lucidrains: blocks that see themselves and the one before, by concatenation; a mask by positions."""

    def __init__(self):
        super().__init__()
        self.qkv, self.size = nn.Linear(WIDTH, 3 * WIDTH), 4

    @staticmethod
    def look_around(x, fill):
        padded = (
            F.pad(x, (0, 0) * (x.dim() - 2) + (1, 0), value=fill)
            if x.dim() == 2
            else F.pad(x, (0, 0, 0, 0, 1, 0), value=fill)
        )
        return torch.cat((padded[:, :-1], padded[:, 1:]), dim=2) if x.dim() > 2 else padded

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, HEADS, 8).transpose(1, 2).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
        bq, bk, bv = (t.reshape(b * HEADS, n // self.size, self.size, 8) for t in (q, k, v))
        bk, bv = self.look_around(bk, -1.0), self.look_around(bv, -1.0)
        places = torch.arange(n).view(1, n // self.size, self.size, 1)
        seen = self.look_around(places, -1).squeeze(-1)
        places = places.squeeze(-1)
        sim = torch.einsum("bhie,bhje->bhij", bq * 0.35, bk)
        masked = (places[..., :, None] < seen[..., None, :]) | (seen[..., None, :] == -1)
        attn = sim.masked_fill(masked, -torch.finfo(sim.dtype).max).softmax(dim=-1)
        out = torch.einsum("bhij,bhje->bhie", attn, bv)
        return out.reshape(b, HEADS, n, 8).transpose(1, 2).reshape(b, n, -1)


class Differential(nn.Module):
    """Microsoft: the difference of two attentions, as weights or as outputs."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.qkv = how, nn.Linear(WIDTH, 3 * WIDTH)
        self.lambda_q, self.lambda_k = (nn.Parameter(torch.randn(8) * 0.1) for _ in range(2))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = (t.view(b, n, HEADS, 8).transpose(1, 2) for t in (q, k))
        v = v.view(b, n, HEADS // 2, 16).transpose(1, 2)
        lam = torch.exp(torch.sum(self.lambda_q * self.lambda_k, dim=-1).float()) + 0.2
        if self.how == "two softmaxes":
            parts = (t.reshape(b, HEADS // 2, 2, n, 8).unbind(2) for t in (q * 8**-0.5, k))
            first, second = (
                F.softmax(q @ k.mT + torch.triu(torch.full((n, n), -INF), 1), -1) for q, k in zip(*parts, strict=True)
            )
            out = F.dropout(first - lam * second, 0.1, self.training) @ v
        elif self.how == "weights":
            scores = q * 8**-0.5 @ k.transpose(-1, -2) + torch.triu(torch.full((n, n), -INF), 1)
            weights = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores).view(b, HEADS // 2, 2, n, n)
            out = torch.matmul(weights[:, :, 0] - lam * weights[:, :, 1], v)
        else:
            parts = (t.reshape(b, HEADS // 2, 2, n, 8).unbind(2) for t in (q, k))
            (q1, q2), (k1, k2) = parts
            out = F.scaled_dot_product_attention(q1, k1, v, is_causal=True)
            out = out - lam * F.scaled_dot_product_attention(q2, k2, v, is_causal=True)
        return out.transpose(1, 2).reshape(b, n, -1)


class GptOss(nn.Module):
    """OpenAI: no batch, groups as a dimension, sinks as a last column that is cut off."""

    def __init__(self):
        super().__init__()
        self.qkv, self.sinks = nn.Linear(WIDTH, WIDTH + 32), nn.Parameter(torch.randn(HEADS))

    def forward(self, x):
        n = x.shape[0]
        qkv = self.qkv(x)
        Q, K, V = qkv[:, :WIDTH].view(n, 2, 2, 8), qkv[:, WIDTH : WIDTH + 16].view(n, 2, 8), qkv[:, -16:].view(n, 2, 8)
        K, V = K[:, :, None, :].expand(-1, -1, 2, -1), V[:, :, None, :].expand(-1, -1, 2, -1)
        S = self.sinks.reshape(2, 2, 1, 1).expand(-1, -1, n, -1)
        mask = torch.triu(Q.new_full((n, n), -INF), diagonal=1)
        mask += torch.tril(mask.new_full((n, n), -INF), diagonal=-4)
        QK = torch.einsum("qhmd,khmd->hmqk", Q, K) * 0.35
        QK += mask[None, None, :, :]
        QK = torch.cat([QK, S], dim=-1)
        W = torch.softmax(QK, dim=-1)[..., :-1]
        return torch.einsum("hmqk,khmd->qhmd", W, V).reshape(n, -1)


class Mla(nn.Module):
    """DeepSeek: keys in two parts, values narrower than keys; ``absorbed`` multiplies with the compressed cache."""

    def __init__(self, absorbed: bool):
        super().__init__()
        self.absorbed, self.rank, self.nope, self.rope, self.v = absorbed, 16, 128, 64, 128
        self.wq = nn.Linear(WIDTH, 2 * (self.nope + self.rope))
        self.wkv_a, self.wkv_b = nn.Linear(WIDTH, self.rank + self.rope), nn.Linear(self.rank, 2 * 256, bias=False)

    def forward(self, x):
        b, s, _ = x.shape
        q = self.wq(x).view(b, s, 2, self.nope + self.rope)
        q_nope, q_pe = torch.split(q, [self.nope, self.rope], dim=-1)
        kv, k_pe = torch.split(self.wkv_a(x), [self.rank, self.rope], dim=-1)
        scale = (self.nope + self.rope) ** -0.5
        mask = torch.full((s, s), -INF).triu_(1)
        if not self.absorbed:
            k_nope, v = torch.split(self.wkv_b(kv).view(b, s, 2, 256), [self.nope, self.v], dim=-1)
            q = torch.cat([q_nope, q_pe], dim=-1)
            k = torch.cat([k_nope, k_pe.unsqueeze(2).expand(-1, -1, 2, -1)], dim=-1)
            scores = torch.einsum("bshd,bthd->bsht", q, k) * scale + mask.unsqueeze(1)
            return torch.einsum("bsht,bthd->bshd", scores.softmax(dim=-1, dtype=torch.float32).type_as(x), v)
        weight = self.wkv_b.weight.view(2, -1, self.rank)
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, weight[:, : self.nope])
        scores = torch.einsum("bshc,btc->bsht", q_nope, kv) + torch.einsum("bshr,btr->bsht", q_pe, k_pe)
        scores = (scores * scale + mask.unsqueeze(1)).softmax(dim=-1, dtype=torch.float32).type_as(x)
        return torch.einsum("bshc,hdc->bshd", torch.einsum("bsht,btc->bshc", scores, kv), weight[:, -self.v :])


ROWS = [
    Row(lambda: XTransformers(False), tokens(), CAUSAL, name="x-transformers"),
    Row(lambda: XTransformers(True), tokens(), CAUSAL, name="x-transformers-one-kv-head"),
    Row(lambda: XTransformers(False, memories=3), tokens(), "k <= 3 + q", name="x-transformers-memories"),
    Row(lambda: XTransformers(False, sink=True), tokens(), CAUSAL, name="x-transformers-sink"),
    Row(
        lambda: XTransformers(False, memories=3),
        lambda: (padded()()[0], padded()()[1].bool()),
        "k <= 3 + q & (k < 3 | padding[b, -3 + k])",
        name="x-transformers-memories-padded",
    ),
    *(
        Row(lambda how=how: XTransformers(False, talking=how), tokens(), (), missed=(why,), name=f"talking-{how}")
        for how, why in (
            ("conv2d", "heads are mixed before the softmax"),
            ("linear", "heads are mixed before the softmax"),
            ("einsum", "heads are mixed before the softmax"),
        )
    ),
    Row(
        LocalAttention,
        tokens(2, 12, WIDTH),
        "Where(k < 4, Where(0 <= -1 + h, -4 + k + 4*h, -1), -4 + k + 4*h) <= q + 4*h & (k < 4 | -4 + k + 4*h != -1) & "
        "(-k < -3 | (0 <= -1 + h & (-1 + h < 0 | -4 + k + 4*h != -1)))",
        symbolic=(0,),
    ),
    Row(lambda: Differential("weights"), tokens(), (CAUSAL, CAUSAL), name="differential-weights"),
    Row(lambda: Differential("outputs"), tokens(), (CAUSAL, CAUSAL), name="differential-outputs"),
    Row(lambda: Differential("two softmaxes"), tokens(), (CAUSAL, CAUSAL), name="differential-softmaxes"),
    Row(GptOss, tokens(13, WIDTH), "k <= q & q - k < 4", symbolic=(0,)),
    Row(lambda: Mla(False), tokens(), CAUSAL, name="mla"),
    Row(lambda: Mla(True), tokens(), CAUSAL, score="bias[b, q, h, k]", name="mla-absorbed"),
]
