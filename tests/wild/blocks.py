"""A small model of two blocks whose attention needs the op: a causal window, written out."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, WINDOW = 32, 4, 5
PREDICATE = f"k <= q & q - k < {WINDOW}"


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in self.qkv(x).chunk(3, -1))
        i = torch.arange(x.shape[-2], device=x.device)
        distance = i[:, None] - i[None, :]
        scores = q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        scores = scores.masked_fill((distance < 0) | (distance >= WINDOW), float("-inf"))
        return self.proj((self.dropout(scores.softmax(-1)) @ v).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(dropout)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0, checkpointed: bool = False):
        super().__init__()
        self.blocks, self.checkpointed = nn.ModuleList(Block(dropout) for _ in range(2)), checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


class Int8Linear(nn.Module):
    """Weights in eight bits with a scale a row, multiplied in the type of the input."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)
