"""Small random operands, the same every time."""

from __future__ import annotations

import torch

B, H, N, D = 2, 3, 11, 8
MIN = torch.finfo(torch.float32).min
INF = float("inf")


def tensors(*shapes, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*(shape or (B, H, N, D)), generator=generator) for shape in shapes]


def qkv():
    return tensors((), (), ())
