"""Attention of diffusion models: images and text, heads by reshape, scores by baddbmm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from row import Row, tokens
from torch import nn

WIDTH, HEADS = 32, 4


class Projections(nn.Module):
    def __init__(self, context: int = WIDTH):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.to_k, self.to_v = nn.Linear(context, WIDTH, bias=False), nn.Linear(context, WIDTH, bias=False)


def head_to_batch(x):
    batch, length, width = x.shape
    return x.reshape(batch, length, HEADS, width // HEADS).permute(0, 2, 1, 3).reshape(batch * HEADS, length, -1)


def batch_to_head(x):
    batch, length, width = x.shape
    return x.reshape(batch // HEADS, HEADS, length, width).permute(0, 2, 1, 3).reshape(batch // HEADS, length, -1)


class AttnProcessor(Projections):
    """diffusers, before SDPA: baddbmm that adds an empty tensor times 0, or the mask repeated for every head."""

    def __init__(self, upcast: bool = False):
        super().__init__()
        self.upcast = upcast

    def scores(self, query, key, attention_mask=None):
        dtype = query.dtype
        if self.upcast:
            query, key = query.float(), key.float()
        if attention_mask is None:
            added = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device)
            beta = 0
        else:
            added, beta = attention_mask, 1
        scores = torch.baddbmm(added, query, key.transpose(-1, -2), beta=beta, alpha=8**-0.5)
        if self.upcast:
            scores = scores.float()
        return scores.softmax(dim=-1).to(dtype)

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        query, key, value = (head_to_batch(t) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if mask is not None:
            mask = ((1 - mask) * -10000.0).unsqueeze(1).repeat_interleave(HEADS, dim=0).expand(-1, x.shape[1], -1)
        out = torch.bmm(self.scores(query, key, mask), value)
        return self.to_out(batch_to_head(out))


class Sliced(AttnProcessor):
    """The same in slices of heads, written into one tensor."""

    def forward(self, x):
        query, key, value = (head_to_batch(t) for t in (self.to_q(x), self.to_k(x), self.to_v(x)))
        out = torch.zeros_like(query)
        for i in range(2):
            part = slice(i * 4, (i + 1) * 4)
            out[part] = torch.bmm(self.scores(query[part], key[part]), value[part])
        return self.to_out(batch_to_head(out))


class AttnProcessor2(Projections):
    """diffusers with SDPA; the mask is [batch, heads, 1, keys] of floats."""

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        batch = x.shape[0]
        q, k, v = (
            t.view(batch, -1, HEADS, 8).transpose(1, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if mask is not None:
            mask = mask.unsqueeze(1).repeat_interleave(HEADS, dim=0).view(batch, HEADS, -1, mask.shape[-1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return self.to_out(out.transpose(1, 2).reshape(batch, -1, WIDTH).to(q.dtype))


class CompVis(Projections):
    """latent-diffusion: einsum over batch times heads, the mask repeated and filled in place."""

    def forward(self, x, context, mask):
        q, k, v = (head_to_batch(t) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * 8**-0.5
        mask = mask.reshape(mask.shape[0], -1)
        mask = mask[:, None, None, :].expand(-1, HEADS, 1, -1).reshape(-1, 1, mask.shape[-1])
        sim.masked_fill_(~mask, -torch.finfo(sim.dtype).max)
        return self.to_out(batch_to_head(torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)))


class VaeBlock(nn.Module):
    """The autoencoder's: one head over pixels; values times weights, channels first."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(3))

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        weights = torch.bmm(q, k.reshape(b, c, h * w)) * int(c) ** -0.5
        weights = F.softmax(weights, dim=2).permute(0, 2, 1)
        return x + torch.bmm(v.reshape(b, c, h * w), weights).reshape(b, c, h, w)


class Guided(nn.Module):
    """OpenAI's guided-diffusion: channels first, einsum, scaled on both sides."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv1d(WIDTH, 3 * WIDTH, 1)

    def forward(self, x):
        bs, width, length = x.shape
        ch = width // HEADS
        q, k, v = self.qkv(x).reshape(bs * HEADS, ch * 3, length).split(ch, dim=1)
        scale = ch**-0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(bs, -1, length)


class Joint(nn.Module):
    """SD3 and Flux: text and image in one sequence, taken apart again."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.RMSNorm(8)

    def forward(self, image, text):
        parts = []
        for x, layer in ((text, self.text), (image, self.image)):
            parts.append([t.view(x.shape[0], -1, HEADS, 8).transpose(1, 2) for t in layer(x).chunk(3, dim=-1)])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        out = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v).transpose(1, 2).flatten(2)
        return out[:, : text.shape[1]], out[:, text.shape[1] :]


class Temporal(Projections):
    """Video: every pixel attends over time."""

    def forward(self, x):
        b, c, f, h, w = x.shape
        x = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, f, c)
        q, k, v = (t.view(-1, f, HEADS, 8).transpose(1, 2) for t in (self.to_q(x), self.to_k(x), self.to_v(x)))
        scores = q @ k.transpose(-1, -2) * 8**-0.5 + torch.full((f, f), float("-inf")).triu(1)
        x = self.to_out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, f, c))
        return x.view(b, h, w, f, c).permute(0, 4, 3, 1, 2)


class IpAdapter(Projections):
    """Two attentions with one query: text, and the image that is asked for."""

    def __init__(self):
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, text, picture):
        def heads(t):
            return t.view(t.shape[0], -1, HEADS, 8).transpose(1, 2)

        q = heads(self.to_q(x))
        out = F.scaled_dot_product_attention(q, heads(self.to_k(text)), heads(self.to_v(text)))
        out = out + 0.6 * F.scaled_dot_product_attention(q, heads(self.to_k_ip(picture)), heads(self.to_v_ip(picture)))
        return self.to_out(out.transpose(1, 2).flatten(2))


def crossed(mask):
    return lambda: (torch.randn(2, 12, WIDTH), torch.randn(2, 7, WIDTH), mask)


SEEN = torch.arange(7) < torch.tensor([[7], [4]])
ROWS = [
    Row(lambda: AttnProcessor(), tokens(), name="baddbmm-empty"),
    Row(lambda: AttnProcessor(upcast=True), tokens(), name="baddbmm-upcast"),
    Row(lambda: AttnProcessor(), crossed(SEEN.float()), name="baddbmm-mask", score="bias"),
    Row(Sliced, tokens(), ("true", "true"), symbolic=(1,)),
    Row(AttnProcessor2, crossed(None)),
    Row(AttnProcessor2, crossed(torch.where(SEEN, 0.0, -10000.0)[:, None]), score="bias", name="sdpa-mask"),
    Row(CompVis, crossed(SEEN), "padding[b, k]"),
    Row(VaeBlock, tokens(2, WIDTH, 3, 4), symbolic=(0,)),
    Row(Guided, tokens(2, WIDTH, 11), symbolic=(0, 2)),
    Row(Joint, lambda: (torch.randn(2, 9, WIDTH), torch.randn(2, 5, WIDTH))),
    Row(Temporal, tokens(2, WIDTH, 5, 2, 3), "k <= q", symbolic=(0,)),
    Row(IpAdapter, lambda: tuple(torch.randn(2, n, WIDTH) for n in (9, 7, 4)), ("true", "true")),
]
