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
