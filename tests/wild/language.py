"""Attention of language models, in the styles of the repositories that people copy from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from row import Row, tokens
from torch import nn

WIDTH, HEADS, LONGEST = 32, 4, 24
INF = float("inf")


class NanoGpt(nn.Module):
    """Karpathy: the mask is a buffer of the longest text, or SDPA's hint."""

    def __init__(self, flash: bool):
        super().__init__()
        self.flash = flash
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout, self.dropout = nn.Dropout(0.1), 0.1
        self.register_buffer("bias", torch.tril(torch.ones(LONGEST, LONGEST)).view(1, 1, LONGEST, LONGEST))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, -INF)
            att = self.attn_dropout(F.softmax(att, dim=-1))
            y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class GptHead(nn.Module):
    """The head of the lecture: one module a head, outputs concatenated."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, 8, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(LONGEST, LONGEST)))

    def forward(self, x):
        _, T, C = x.shape
        wei = self.query(x) @ self.key(x).transpose(-2, -1) * C**-0.5
        wei = F.softmax(wei.masked_fill(self.tril[:T, :T] == 0, -INF), dim=-1)
        return wei @ self.value(x)


class GptHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(GptHead() for _ in range(2))

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class LlamaReference(nn.Module):
    """Meta's code: rotary by complex numbers, a cache that the module holds, keys repeated, a mask with a past."""

    def __init__(self):
        super().__init__()
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.register_buffer("cache_k", torch.randn(2, LONGEST, 2, 8), persistent=False)
        self.register_buffer("cache_v", torch.randn(2, LONGEST, 2, 8), persistent=False)
        angles = torch.outer(torch.arange(LONGEST).float(), 1.0 / (10000.0 ** (torch.arange(0, 8, 2) / 8)))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)

    @staticmethod
    def rotary(x, freqs_cis):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis.view(1, pairs.shape[1], 1, -1)).flatten(3).type_as(x)

    @staticmethod
    def repeat_kv(x, times: int):
        bsz, length, heads, width = x.shape
        return x[:, :, :, None, :].expand(bsz, length, heads, times, width).reshape(bsz, length, heads * times, width)

    def forward(self, x, start_pos: int):
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, HEADS, 8)
        xk, xv = (layer(x).view(bsz, seqlen, 2, 8) for layer in (self.wk, self.wv))
        freqs_cis = self.freqs_cis[start_pos : start_pos + seqlen]
        xq, xk = self.rotary(xq, freqs_cis), self.rotary(xk, freqs_cis)
        mask = None
        if seqlen > 1:
            mask = torch.triu(torch.full((seqlen, seqlen), -INF), diagonal=1)
            mask = torch.hstack([torch.zeros((seqlen, start_pos)), mask]).type_as(x)
        self.cache_k[:bsz, start_pos : start_pos + seqlen] = xk
        self.cache_v[:bsz, start_pos : start_pos + seqlen] = xv
        keys, values = self.cache_k[:bsz, : start_pos + seqlen], self.cache_v[:bsz, : start_pos + seqlen]
        keys, values = self.repeat_kv(keys, 2), self.repeat_kv(values, 2)
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(8)
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(output)


class Whisper(nn.Module):
    """OpenAI: scaled on both sides, the mask of the longest text is an input, the scores are returned."""

    def __init__(self, fused: bool, returned: bool = False):
        super().__init__()
        self.fused, self.returned = fused, returned
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("mask", torch.empty(LONGEST, LONGEST).fill_(-INF).triu_(1), persistent=False)

    def forward(self, x, xa=None):
        source = x if xa is None else xa
        q, k, v = self.query(x), self.key(source), self.value(source)
        n_ctx, n_state = q.shape[1:]
        scale = (n_state // HEADS) ** -0.25
        q, k, v = (t.view(*t.shape[:2], HEADS, -1).permute(0, 2, 1, 3) for t in (q, k, v))
        qk = None
        if self.fused:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=xa is None and n_ctx > 1)
            out = a.permute(0, 2, 1, 3).flatten(start_dim=2)
        else:
            qk = (q * scale) @ (k * scale).transpose(-1, -2)
            if xa is None:
                qk = qk + self.mask[:n_ctx, :n_ctx]
            qk = qk.float()
            w = F.softmax(qk, dim=-1).to(q.dtype)
            out = (w @ v).permute(0, 2, 1, 3).flatten(start_dim=2)
            qk = qk.detach()
        return (self.out(out), qk) if self.returned else self.out(out)


class TorchTune(nn.Module):
    """Keys of grouped heads expanded while heads and groups are apart; a boolean mask [B, N, N] from the caller."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)

    def forward(self, x, mask=None):
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, HEADS, 8).transpose(1, 2)
        k, v = self.k_proj(x).view(b, s, -1, 8).transpose(1, 2), self.v_proj(x).view(b, s, -1, 8).transpose(1, 2)
        shape = (b, 2, 2, -1, 8)
        k, v = (t.unsqueeze(2).expand(shape).flatten(1, 2) for t in (k, v))
        if mask is not None:
            mask = mask[:, None, :, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=mask is None)
        return out.transpose(1, 2).contiguous().view(b, s, -1)


class XTransformers(nn.Module):
    """lucidrains: einsum, one key head for all, memory keys in front, a causal mask that starts at the diagonal."""

    def __init__(self, one_kv_head: bool, memories: int = 0, talking: str = ""):
        super().__init__()
        self.memories, self.one, self.talking = memories, one_kv_head, talking
        kv = 8 if one_kv_head else WIDTH
        self.to_q, self.to_k, self.to_v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, kv), nn.Linear(WIDTH, kv)
        if memories:
            self.mem_k, self.mem_v = (nn.Parameter(torch.randn(HEADS, memories, 8)) for _ in range(2))
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
        attn = F.softmax(dots, dim=-1, dtype=torch.float32).type(dots.dtype)
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


class Fairseq(nn.Module):
    """Time first, heads in the batch; the padding mask is applied to scores that are viewed apart for a moment."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, key_padding_mask):
        x = x.transpose(0, 1)
        tgt_len, bsz, width = x.size()
        q, k, v = (
            layer(x).contiguous().view(-1, bsz * HEADS, width // HEADS).transpose(0, 1)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q * 0.35
        src_len = k.size(1)
        attn_weights = torch.bmm(q, k.transpose(1, 2))
        attn_weights += torch.triu(torch.zeros(tgt_len, src_len).fill_(-INF), 1).unsqueeze(0)
        attn_weights = attn_weights.view(bsz, HEADS, tgt_len, src_len)
        attn_weights = attn_weights.masked_fill(key_padding_mask.unsqueeze(1).unsqueeze(2).to(torch.bool), -INF)
        attn_weights = attn_weights.view(bsz * HEADS, tgt_len, src_len)
        attn = torch.bmm(F.softmax(attn_weights, dim=-1, dtype=torch.float32).type_as(attn_weights), v)
        return attn.transpose(0, 1).contiguous().view(tgt_len, bsz, width).transpose(0, 1)


class Annotated(nn.Module):
    """The Annotated Transformer: a mask tensor [B, 1, N] or [B, N, N] from the caller, hidden where it is 0."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, mask):
        mask, nbatches = mask.unsqueeze(1), x.size(0)
        query, key, value = (lin(x).view(nbatches, -1, HEADS, 8).transpose(1, 2) for lin in self.linears[:3])
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        scores = scores.masked_fill(mask == 0, -1e9)
        x = torch.matmul(self.dropout(scores.softmax(dim=-1)), value)
        return self.linears[-1](x.transpose(1, 2).contiguous().view(nbatches, -1, WIDTH))


class Gemma(nn.Module):
    """Google's gemma_pytorch: capped scores, a local mask added to the global one."""

    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(WIDTH, WIDTH + 32)

    def forward(self, x):
        b, n, _ = x.shape
        xq, xk, xv = self.qkv_proj(x).split([WIDTH, 16, 16], dim=-1)
        xq, xk, xv = xq.view(b, -1, HEADS, 8), xk.view(b, -1, 2, 8), xv.view(b, -1, 2, 8)
        key, value = torch.repeat_interleave(xk, 2, dim=2), torch.repeat_interleave(xv, 2, dim=2)
        q, k, v = xq.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        angles = torch.outer(torch.arange(n).float(), 100.0 ** -torch.arange(4))
        cos, sin = (torch.cat((f(angles), f(angles)), dim=-1) for f in (torch.cos, torch.sin))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q.mul_(8**-0.5)
        scores = torch.matmul(q, k.transpose(2, 3))
        mask = torch.full((1, 1, n, n), -2.3819763e38).triu(diagonal=1)
        ones = torch.ones((1, 1, n, n))
        local = torch.triu(ones, -3) * torch.tril(ones, 3)
        mask = torch.where(local == 1, mask, -2.3819763e38)
        scores = torch.tanh(scores / 50.0) * 50.0
        scores = F.softmax((scores + mask).float(), dim=-1).type_as(q)
        return torch.matmul(scores, v).transpose(1, 2).contiguous().view(b, n, -1)


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
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
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
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
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


class OffByOne(nn.Module):
    """Softmax with one more in the denominator, as a column of zeros."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = F.pad(q @ k.transpose(-1, -2) * 0.35, (0, 1))
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2)


class ByHand(nn.Module):
    """The softmax itself written out."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.qkv = how, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
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


def padded(length: int = 13):
    return lambda: (torch.randn(2, length, WIDTH), (torch.arange(length) >= torch.tensor([[0], [4]])).long())


def pairs():
    return torch.randn(2, 13, WIDTH), torch.rand(2, 13, 13) > 0.3


def alignment():
    """Sequences of an alignment, pairs of residues, and which residues there are."""
    seen = torch.arange(5) < torch.tensor([[5] * 3, [4, 5, 2]])[..., None]
    return torch.randn(2, 3, 5, WIDTH), torch.randn(2, 5, 5, 6), seen.float()


CAUSAL = "k <= q"
NO_PRODUCT = "the scores do not come from a product of two tensors: not attention"

ROWS = [
    Row(lambda: NanoGpt(False), tokens(), CAUSAL, name="nanogpt"),
    Row(lambda: NanoGpt(True), tokens(), CAUSAL, name="nanogpt-flash"),
    Row(GptHeads, tokens(), (CAUSAL, CAUSAL)),
    Row(LlamaReference, lambda: (torch.randn(2, 5, WIDTH), 0), CAUSAL, name="llama-reference"),
    Row(LlamaReference, lambda: (torch.randn(2, 5, WIDTH), 7), "k <= 7 + q", name="llama-reference-later"),
    Row(LlamaReference, lambda: (torch.randn(2, 1, WIDTH), 7), name="llama-reference-step"),
    Row(lambda: Whisper(False), tokens(), CAUSAL, name="whisper"),
    Row(lambda: Whisper(True), tokens(), CAUSAL, name="whisper-fused", symbolic=(0,)),
    Row(lambda: Whisper(False, True), tokens(), CAUSAL, name="whisper-scores-returned"),
    Row(lambda: Whisper(False), lambda: (torch.randn(2, 5, WIDTH), torch.randn(2, 9, WIDTH)), name="whisper-cross"),
    Row(TorchTune, tokens(), CAUSAL),
    Row(
        TorchTune,
        lambda: (torch.randn(2, 13, WIDTH), torch.rand(2, 13, 13) > 0.3),
        "mask[b, q, k]",
        name="torchtune-mask",
    ),
    Row(lambda: XTransformers(False), tokens(), CAUSAL, name="x-transformers"),
    Row(lambda: XTransformers(True), tokens(), CAUSAL, name="x-transformers-one-kv-head"),
    Row(lambda: XTransformers(False, memories=3), tokens(), "k <= 3 + q", name="x-transformers-memories"),
    Row(
        lambda: XTransformers(False, memories=3),
        lambda: (padded()()[0], padded()()[1].bool()),
        "k <= 3 + q & (k < 3 | padding[b, -3 + k])",
        name="x-transformers-memories-padded",
    ),
    *(
        Row(lambda how=how: XTransformers(False, talking=how), tokens(), (), missed=(why,), name=f"talking-{how}")
        for how, why in (
            ("conv2d", "conv2d mixes the scores of several heads before softmax"),
            ("linear", "linear mixes the scores of several heads before softmax"),
            ("einsum", "the layout of value is not understood"),
        )
    ),
    Row(
        LocalAttention,
        tokens(2, 12, WIDTH),
        "Where(k < 4, Where(0 <= -1 + h, -4 + k + 4*h, -1), -4 + k + 4*h) <= q + 4*h & (k < 4 | -4 + k + 4*h != -1) & "
        "(-k < -3 | (0 <= -1 + h & (-1 + h < 0 | -4 + k + 4*h != -1)))",
        symbolic=(0,),
    ),
    Row(
        AlibiMpt, tokens(), score="Where(0 < k - q, -3.4028235e+38, 0.35355339*s + bias[0, h, 0, 11 + k])", train=False
    ),
    Row(AlibiBloom, padded(), "k <= q & padding[b, k]", score="slopes[h]"),
    Row(AlibiFalcon, padded(), "true", score="bias3[b, 0, q, k]"),  # its fill is a number that rounding tells apart
    Row(T5, tokens(), "true", score="bias"),
    Row(Deberta, tokens(), score="bias2[b, h, k, 24 + k - q]"),
    Row(TransformerXl, tokens(), CAUSAL, score="bias[b, h, "),
    Row(lambda: Differential("weights"), tokens(), (CAUSAL, CAUSAL), name="differential-weights"),
    Row(lambda: Differential("outputs"), tokens(), (CAUSAL, CAUSAL), name="differential-outputs"),
    Row(lambda: Differential("two softmaxes"), tokens(), (CAUSAL, CAUSAL), name="differential-softmaxes"),
    Row(GptOss, tokens(13, WIDTH), "k <= q & q - k < 4", symbolic=(0,)),
    Row(lambda: Mla(False), tokens(), CAUSAL, name="mla"),
    Row(lambda: Mla(True), tokens(), CAUSAL, score="bias[b, q, h, k]", name="mla-absorbed"),
    Row(Fairseq, lambda: (padded()()[0], 1 - padded()()[1].flip(1)), "k <= q & ~padding[b//4, k]"),
    Row(Annotated, lambda: (padded()()[0], padded()()[1].unsqueeze(1)), "padding[b, 0, k]"),
    Row(
        Annotated,
        lambda: (torch.randn(2, 13, WIDTH), torch.rand(2, 13, 13) > 0.3),
        "mask[b, q, k]",
        name="annotated-pairs",
    ),
    Row(Gemma, tokens(), "k <= q & q - k < 4", score="50*tanh("),
    Row(Performer, tokens(), ()),
    Row(Efficient, tokens(), (), missed=(NO_PRODUCT, NO_PRODUCT)),
    Row(Bahdanau, tokens(), (), missed=(NO_PRODUCT,)),
    Row(Linformer, tokens(), symbolic=(0,)),
    Row(SetTransformer, tokens()),
    Row(PairBias, alignment, score="bias", symbolic=(0,)),
    Row(OffByOne, tokens()),
    Row(lambda: ByHand("exp"), tokens(), CAUSAL, name="softmax-by-exp"),
    Row(lambda: ByHand("logsumexp"), tokens(), CAUSAL, name="softmax-by-logsumexp"),
    Row(lambda: ByHand("max"), tokens(), CAUSAL, name="softmax-by-max"),
    Row(lambda: ByHand("unsafe"), tokens(), CAUSAL, name="softmax-without-max"),
    Row(lambda: ByHand("returned"), tokens(), (), missed=("the attention weights are used",), name="softmax-returned"),
    Row(lambda: ByHand("special"), tokens(), CAUSAL, name="softmax-special"),
]
