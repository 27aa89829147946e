"""Attention within windows of an image: shifted, overlapping, of several lengths."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from images import HEADS, WIDTH, image, relative_index
from row import Row, tokens
from torch import nn


def window_partition(x, size):
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, channels)


def window_reverse(windows, size, height, width):
    channels = windows.shape[-1]
    x = windows.view(-1, height // size, width // size, size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, channels)


class Swin(nn.Module):
    """Shifted windows: a table of relative positions is added, then a mask of regions that depends on the window."""

    def __init__(self, shift: int = 0, fused: bool = False, dynamic_mask: bool = False):
        super().__init__()
        self.size, self.shift, self.fused, self.side, self.dynamic_mask = 4, shift, fused, 8, dynamic_mask
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn((2 * self.size - 1) ** 2, HEADS))
        self.register_buffer("index", relative_index(self.size), persistent=False)
        self.register_buffer("attn_mask", self.make_mask() if shift and not dynamic_mask else None, persistent=False)

    def make_mask(self):
        regions = torch.zeros(1, self.side, self.side, 1)
        count = 0
        for rows in ((0, -self.size), (-self.size, -self.shift), (-self.shift, None)):
            for columns in ((0, -self.size), (-self.size, -self.shift), (-self.shift, None)):
                regions[:, rows[0] : rows[1], columns[0] : columns[1], :] = count
                count += 1
        windows = window_partition(regions, self.size).view(-1, self.size**2)
        mask = windows.unsqueeze(1) - windows.unsqueeze(2)
        return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)

    def attention(self, x, mask):
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = self.table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.fused:
            if mask is not None:
                windows = mask.shape[0]
                mask = mask.view(1, windows, 1, length, length).expand(batch // windows, -1, HEADS, -1, -1)
                bias = bias + mask.reshape(-1, HEADS, length, length)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            attn = (q * 0.35) @ k.transpose(-2, -1) + bias
            if mask is not None:
                windows = mask.shape[0]
                attn = attn.view(-1, windows, HEADS, length, length) + mask.unsqueeze(1).unsqueeze(0)
                attn = attn.view(-1, HEADS, length, length)
            x = attn.softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, length, -1))

    def forward(self, x):
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        mask = self.make_mask() if self.dynamic_mask else self.attn_mask
        windows = window_partition(x, self.size).view(-1, self.size**2, WIDTH)
        out = self.attention(windows, mask).view(-1, self.size, self.size, WIDTH)
        x = window_reverse(out, self.size, self.side, self.side)
        return torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2)) if self.shift else x


class SwinV2(nn.Module):
    """Cosine of query and key, a learned temperature for each head, a bias made by a small network."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=False)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))
        self.cpb = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, HEADS, bias=False))
        grid = torch.stack(torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij"), -1)
        self.register_buffer("coords", grid[None], persistent=False)
        self.register_buffer("index", relative_index(4), persistent=False)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        table = self.cpb(self.coords).view(-1, HEADS)
        bias = table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1).contiguous()
        attn = (attn + (16 * torch.sigmoid(bias)).unsqueeze(0)).softmax(dim=-1)
        return (attn @ v).transpose(1, 2).reshape(batch, length, width)


class Neighbourhood(nn.Module):
    """Each pixel sees those near it, in two or three dimensions; written as a mask of all pairs."""

    def __init__(self, sizes: tuple[int, ...], clamped: bool):
        super().__init__()
        self.sizes, self.clamped, self.qkv = sizes, clamped, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        place, allowed = torch.arange(length), None
        for size in reversed(self.sizes):
            here, place = place % size, place // size
            if self.clamped:  # windows at the border are as large as the others
                first = (here - 1).clamp(0, size - 3)
                near = (here[None, :] >= first[:, None]) & (here[None, :] < first[:, None] + 3)
            else:
                near = (here[:, None] - here[None, :]).abs() <= 1
            allowed = near if allowed is None else allowed & near
        scores = (q @ k.transpose(-1, -2) * 0.35).masked_fill(~allowed, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)


class Grid(nn.Module):
    """MaxViT: pixels of the same place in every window attend to each other."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        batch, side, _, width = x.shape
        x = x.view(batch, 2, side // 2, 2, side // 2, width).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, width)
        q, k, v = self.qkv(x).view(-1, 4, HEADS, 3 * width // HEADS).transpose(1, 2).chunk(3, dim=3)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, width)
        x = x.view(batch, side // 2, side // 2, 2, 2, width).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(batch, side, side, width)


class VisionWindows(nn.Module):
    """Qwen2-VL: one row of patches of several images; a mask filled block by block, or a split."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.qkv, self.lengths = how, nn.Linear(WIDTH, 3 * WIDTH), (4, 6, 3)

    def forward(self, x, cu_seqlens=None):
        length = x.shape[0]
        q, k, v = self.qkv(x).reshape(length, 3, HEADS, -1).permute(1, 0, 2, 3).unbind(0)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        if self.how == "split":
            parts = zip(*(t.unsqueeze(0).split(self.lengths, dim=2) for t in (q, k, v)), strict=True)
            out = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)
            return out.squeeze(0).transpose(0, 1).reshape(length, -1)
        mask = torch.full([1, length, length], torch.finfo(q.dtype).min)
        if self.how == "filled":
            start = 0
            for size in self.lengths:
                mask[..., start : start + size, start : start + size] = 0
                start += size
        else:
            document = (torch.arange(length)[:, None] >= cu_seqlens[None, 1:]).sum(-1)
            mask = mask.masked_fill(document[:, None] == document[None, :], 0)
        weights = torch.matmul(q, k.transpose(1, 2)) / math.sqrt(WIDTH // HEADS) + mask
        out = torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)
        return out.transpose(0, 1).reshape(length, -1)


ROWS = [
    Row(lambda: Swin(), image, name="swin", symbolic=(0,)),
    Row(lambda: Swin(shift=2), image, name="swin-shifted", symbolic=(0,)),
    Row(lambda: Swin(shift=2, fused=True), image, name="swin-shifted-fused", symbolic=(0,)),
    Row(lambda: Swin(shift=2, dynamic_mask=True), image, name="swin-mask-inside", symbolic=(0,)),
    Row(SwinV2, tokens(2, 16, WIDTH), symbolic=(0,)),
    Row(
        lambda: Neighbourhood((4, 5), False),
        tokens(2, 20, WIDTH),
        "k%5 <= 1 + q%5 & q%5 <= 1 + k%5 & (k//5)%4 <= 1 + (q//5)%4 & (q//5)%4 <= 1 + (k//5)%4",
        name="neighbours-2d",
        symbolic=(0,),
    ),
    Row(
        lambda: Neighbourhood((4, 5), True),
        tokens(2, 20, WIDTH),
        "Min(2, Max(0, -1 + q%5)) <= k%5 & k%5 < 3 + Min(2, Max(0, -1 + q%5)) & "
        "Min(1, Max(0, -1 + (q//5)%4)) <= (k//5)%4 & (k//5)%4 < 3 + Min(1, Max(0, -1 + (q//5)%4))",
        name="neighbours-2d-clamped",
        symbolic=(0,),
    ),
    Row(
        lambda: Neighbourhood((3, 3, 4), False),
        tokens(2, 36, WIDTH),
        "k%4 <= 1 + q%4 & q%4 <= 1 + k%4 & (k//4)%3 <= 1 + (q//4)%3 & (q//4)%3 <= 1 + (k//4)%3 & "
        "((k//4)//3)%3 <= 1 + ((q//4)//3)%3 & ((q//4)//3)%3 <= 1 + ((k//4)//3)%3",
        name="neighbours-3d",
        symbolic=(0,),
    ),
    Row(Grid, tokens(2, 6, 6, WIDTH), symbolic=(0,)),
    Row(lambda: VisionWindows("split"), tokens(13, WIDTH), ("true",) * 3, name="windows-split", symbolic=()),
    Row(lambda: VisionWindows("filled"), tokens(13, WIDTH), "true", name="windows-filled", symbolic=()),
    Row(
        lambda: VisionWindows("cu_seqlens"),
        lambda: (torch.randn(13, WIDTH), torch.tensor([0, 4, 10, 13])),
        "document[q] == document[k]",
        name="windows-cu_seqlens",
        symbolic=(0,),
    ),
]
