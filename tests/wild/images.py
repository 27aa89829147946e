"""Attention over images, as timm and the papers' own code write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from row import Row, tokens
from torch import nn

WIDTH, HEADS = 32, 4


class Vit(nn.Module):
    """timm: packed projection, reshaped and unbound, query and key normalised."""

    def __init__(self, fused: bool = False, normed: bool = False):
        super().__init__()
        self.fused, self.scale = fused, (WIDTH // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        norm = nn.LayerNorm if normed else nn.Identity
        self.q_norm, self.k_norm = norm(WIDTH // HEADS), norm(WIDTH // HEADS)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, length, width)))


class ClassAttention(nn.Module):
    """CaiT: only the class token asks."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        batch, length, width = x.shape
        q = self.q(x[:, 0]).unsqueeze(1).reshape(batch, 1, HEADS, width // HEADS).permute(0, 2, 1, 3)
        k, v = (layer(x).reshape(batch, length, HEADS, -1).permute(0, 2, 1, 3) for layer in (self.k, self.v))
        attn = (q * 0.3 @ k.transpose(-2, -1)).softmax(dim=-1)
        return (attn @ v).transpose(1, 2).reshape(batch, 1, width)


class SpatialReduction(nn.Module):
    """PVT: keys and values from a smaller image."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.sr, self.norm = nn.Conv2d(WIDTH, WIDTH, 2, 2), nn.LayerNorm(WIDTH)

    def forward(self, x):
        batch, length, width = x.shape
        side = math.isqrt(length)
        q = self.q(x).reshape(batch, length, HEADS, width // HEADS).permute(0, 2, 1, 3)
        small = self.sr(x.permute(0, 2, 1).reshape(batch, width, side, side)).reshape(batch, width, -1).permute(0, 2, 1)
        kv = self.kv(self.norm(small)).reshape(batch, -1, 2, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        attn = ((q @ k.transpose(-2, -1)) * 0.35).softmax(dim=-1)
        return (attn @ v).transpose(1, 2).reshape(batch, length, width)


class DecomposedPositions(nn.Module):
    """MViTv2: positions of rows and columns apart, written into the part of the scores behind the class token."""

    def __init__(self, side: int = 3):
        super().__init__()
        self.side, self.qkv = side, nn.Linear(WIDTH, 3 * WIDTH)
        self.rows, self.columns = (nn.Parameter(torch.randn(2 * side - 1, WIDTH // HEADS)) for _ in range(2))

    def forward(self, x):
        batch, length, width = x.shape
        side = self.side
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * 0.35) @ k.transpose(-2, -1)
        distance = torch.arange(side)[:, None] - torch.arange(side)[None, :] + side - 1
        image = q[:, :, 1:].reshape(batch, HEADS, side, side, -1)
        rows = torch.einsum("byhwc,hkc->byhwk", image, self.rows[distance])
        columns = torch.einsum("byhwc,wkc->byhwk", image, self.columns[distance])
        attn[:, :, 1:, 1:] = (
            attn[:, :, 1:, 1:].view(batch, -1, side, side, side, side)
            + rows[:, :, :, :, :, None]
            + columns[:, :, :, :, None, :]
        ).view(batch, -1, side * side, side * side)
        return (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)


class ChannelAttention(nn.Module):
    """XCiT: channels attend to channels, normalised over tokens, with a learned temperature for each head."""

    def __init__(self):
        super().__init__()
        self.qkv, self.temperature = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 4, 1).unbind(0)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return (attn.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(batch, length, width)


def relative_index(size: int) -> torch.Tensor:
    coords = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + size - 1
    return relative[..., 0] * (2 * size - 1) + relative[..., 1]


class Beit(nn.Module):
    """A table of relative positions that has three more rows for the class token."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused, self.side = fused, 3
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        count = (2 * self.side - 1) ** 2 + 3
        self.table = nn.Parameter(torch.randn(count, HEADS))
        index = torch.zeros(self.side**2 + 1, self.side**2 + 1, dtype=torch.long)
        index[1:, 1:] = relative_index(self.side)
        index[0, :], index[:, 0], index[0, 0] = count - 3, count - 2, count - 1
        self.register_buffer("index", index, persistent=False)

    def forward(self, x):
        batch, length, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        positions = self.table[self.index.view(-1)].view(self.side**2 + 1, self.side**2 + 1, -1).permute(2, 0, 1)
        positions = positions.contiguous().unsqueeze(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=positions)
        else:
            x = (q * 0.35 @ k.transpose(-2, -1) + positions).softmax(-1) @ v
        return x.transpose(1, 2).reshape(batch, length, width)


class Sam(nn.Module):
    """Positions decomposed in rows and columns, as products of the query with tables."""

    def __init__(self):
        super().__init__()
        self.side, self.qkv = 4, nn.Linear(WIDTH, 3 * WIDTH)
        self.rel_h, self.rel_w = (nn.Parameter(torch.randn(7, WIDTH // HEADS)) for _ in range(2))

    def forward(self, x):
        batch, side, _, width = x.shape
        qkv = self.qkv(x).reshape(batch, side * side, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, batch * HEADS, side * side, -1).unbind(0)
        attn = (q * 0.35) @ k.transpose(-2, -1)
        i = torch.arange(side)
        relative = i[:, None] - i[None, :] + side - 1
        grid = q.reshape(batch * HEADS, side, side, -1)
        high = torch.einsum("bhwc,hkc->bhwk", grid, self.rel_h[relative])
        wide = torch.einsum("bhwc,wkc->bhwk", grid, self.rel_w[relative])
        attn = attn.view(-1, side, side, side, side) + high[:, :, :, :, None] + wide[:, :, :, None, :]
        attn = attn.view(batch * HEADS, side * side, side * side).softmax(dim=-1)
        out = (attn @ v).view(batch, HEADS, side, side, -1).permute(0, 2, 3, 1, 4)
        return out.reshape(batch, side, side, width)


class CrossCovariance(nn.Module):
    """XCiT: channels attend to channels."""

    def __init__(self):
        super().__init__()
        self.qkv, self.temperature = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 4, 1).unbind(0)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return (attn.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(batch, length, width)


class Axial(nn.Module):
    """Along rows, then along columns, without a reshape: the image keeps its dimensions."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, x):
        for layer, equations in zip(
            self.qkv, (("yihd,yjhd->yhij", "yhij,yjhd->yihd"), ("ixhd,jxhd->xhij", "xhij,jxhd->ixhd")), strict=True
        ):
            q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in layer(x).chunk(3, dim=-1))
            into, out = (self._with_batch(equation) for equation in equations)
            x = x + torch.einsum(out, torch.einsum(into, q * 0.35, k).softmax(-1), v).flatten(-2)
        return x

    @staticmethod
    def _with_batch(equation: str) -> str:
        operands, result = equation.split("->")
        return ",".join("b" + one for one in operands.split(",")) + "->b" + result


class Perceiver(nn.Module):
    """Learned latents attend to the input, or (Flamingo's resampler) to the input and themselves."""

    def __init__(self, resampler: bool = False):
        super().__init__()
        self.resampler, self.latents = resampler, nn.Parameter(torch.randn(5, WIDTH))
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x, hidden=None):
        batch = x.shape[0]
        latents = self.latents.unsqueeze(0).expand(batch, -1, -1)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=1) if self.resampler else x).chunk(2, dim=-1)
        q, k, v = (t.view(batch, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for t in (q, k, v))
        sim = torch.einsum("bhid,bhjd->bhij", q * 0.35, k)
        if hidden is not None:
            sim = sim.masked_fill(hidden[:, None, None, :], -torch.finfo(sim.dtype).max)
        if self.resampler:
            sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        out = torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)
        return out.transpose(1, 2).reshape(batch, 5, WIDTH)


class NonLocal(nn.Module):
    """Wang et al.: one head over all pixels, the query last, without a scale."""

    def __init__(self):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(WIDTH, 16, 1) for _ in range(3))
        self.out = nn.Conv2d(16, WIDTH, 1)

    def forward(self, x):
        batch, _, height, width = x.shape
        theta, phi, g = (layer(x).view(batch, 16, -1) for layer in (self.theta, self.phi, self.g))
        weights = F.softmax(torch.matmul(theta.permute(0, 2, 1), phi), dim=-1)
        y = torch.matmul(weights, g.permute(0, 2, 1)).permute(0, 2, 1).contiguous().view(batch, 16, height, width)
        return x + self.out(y)


class Deformable(nn.Module):
    """DETR's sampled points: a softmax over points, no product of queries and keys."""

    def __init__(self):
        super().__init__()
        self.weights, self.value = nn.Linear(WIDTH, HEADS * 3), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, length, width = x.shape
        weights = F.softmax(self.weights(x).view(batch, length, HEADS, 3), -1)
        value = self.value(x).view(batch, length, HEADS, -1)
        points = torch.stack([value.roll(n, 1) for n in range(3)], dim=3)
        return (points * weights[..., None]).sum(3).reshape(batch, length, width)


image = tokens(4, 8, 8, WIDTH)
padded = lambda: (torch.randn(2, 13, WIDTH), torch.arange(13) >= torch.tensor([[13], [6]]))  # noqa: E731
NO_PRODUCT = "the scores do not come from a product of two tensors: not attention"


ROWS = [
    Row(lambda: Vit(), tokens(), name="vit"),
    Row(lambda: Vit(normed=True), tokens(), name="vit-normed"),
    Row(lambda: Vit(fused=True), tokens(), name="vit-fused"),
    Row(ClassAttention, tokens()),
    Row(SpatialReduction, tokens(2, 16, WIDTH), symbolic=(0,)),
    Row(DecomposedPositions, tokens(2, 10, WIDTH), score="Where(1 <= k & 1 <= q, 0.35*s + ", symbolic=(0,)),
    Row(ChannelAttention, tokens(2, 10, WIDTH), score="s*slopes[h, 0, 0]", symbolic=(0,)),
    Row(lambda: Beit(False), tokens(2, 10, WIDTH), name="beit", symbolic=(0,)),
    Row(lambda: Beit(True), tokens(2, 10, WIDTH), name="beit-fused", symbolic=(0,)),
    Row(Sam, tokens(2, 4, 4, WIDTH), score="bias2[b, q//4, q%4, k%4]", symbolic=(0,)),
    Row(CrossCovariance, tokens(), symbolic=(0,)),
    Row(Axial, tokens(2, 5, 6, WIDTH), ("true", "true"), symbolic=(0,)),
    Row(Perceiver, tokens()),
    Row(lambda: Perceiver(), padded, "~padding[b, k]", name="perceiver-padded"),
    Row(lambda: Perceiver(resampler=True), tokens(), name="resampler"),
    Row(NonLocal, tokens(2, WIDTH, 4, 5), symbolic=(0,)),
    Row(Deformable, tokens(), (), missed=(NO_PRODUCT,)),
]
