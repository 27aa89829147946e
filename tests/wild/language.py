"""Attention of language models, in the styles of the repositories that people copy from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from row import Row, tokens
from torch import nn

WIDTH, HEADS, LONGEST = 32, 4, 24
INF = float("inf")
CAUSAL = "k <= q"
NO_PRODUCT = "the scores do not come from a product of two tensors: not attention"


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


def padded(length: int = 13):
    return lambda: (torch.randn(2, length, WIDTH), (torch.arange(length) >= torch.tensor([[0], [4]])).long())


def pairs():
    return torch.randn(2, 13, WIDTH), torch.rand(2, 13, 13) > 0.3


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
    Row(Fairseq, lambda: (padded()()[0], 1 - padded()()[1].flip(1)), "k <= q & ~padding[b//4, k]"),
    Row(Annotated, lambda: (padded()()[0], padded()()[1].unsqueeze(1)), "padding[b, 0, k]"),
    Row(
        Annotated,
        lambda: (torch.randn(2, 13, WIDTH), torch.rand(2, 13, 13) > 0.3),
        "mask[b, q, k]",
        name="annotated-pairs",
    ),
    Row(Gemma, tokens(), "k <= q & q - k < 4", score="50*tanh("),
]
