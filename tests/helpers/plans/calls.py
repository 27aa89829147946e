"""What every plan for trying kernels is made of: sizes, a call, the table of cases, tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
import torch

from effattn.ir.expr import FloorDiv, IsPowerOfTwo, k, q
from effattn.ir.plan import Plan

CAUSAL = sympy.Le(k, q)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    q_len: int = 57
    k_len: int = 57
    head_dim: int = 16
    value_dim: int = 16

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Call:
    """A plan and everything that is passed beside query, key and value."""

    plan: Plan
    captures: list[torch.Tensor] = field(default_factory=list)
    scalars: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)


Build = Callable[[Sizes, torch.device], Call]
CASES: dict[str, Build] = {}


def case(build: Build) -> Build:
    CASES[build.__name__] = build
    return build


def power_keep(block: int, window: int, sinks: int, position=q):
    distance = FloorDiv(position, block) - FloorDiv(k, block)
    return sympy.Or(distance < window // block, IsPowerOfTwo(distance), k < sinks)


def random(shape, device, seed=3, dtype=torch.float32):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return made.to(dtype).to(device)


def padding_of(sizes: Sizes, device, left: bool) -> torch.Tensor:
    """bool [B, Nk]: the first batch is whole, later ones lack a growing part on one side."""
    live = torch.arange(sizes.batch) * (sizes.k_len // (sizes.batch + 1))
    columns = torch.arange(sizes.k_len)[None, :]
    mask = columns >= live[:, None] if left else columns < (sizes.k_len - live)[:, None]
    return mask.to(device)


def tensors(sizes: Sizes, device="cpu", dtype=torch.float32, seed=0, order="bhnd"):
    """Query, key and value, [B, H, N, D]; ``order`` names the dimensions as they lie in memory."""
    shapes = (
        (sizes.batch, sizes.heads, sizes.q_len, sizes.head_dim),
        (sizes.batch, sizes.kv_heads, sizes.k_len, sizes.head_dim),
        (sizes.batch, sizes.kv_heads, sizes.k_len, sizes.value_dim),
    )
    made = []
    for i, shape in enumerate(shapes):
        tensor = random(shape, device, seed + i, dtype)
        turn = ["bhnd".index(name) for name in order]
        back = [order.index(name) for name in "bhnd"]
        made.append(tensor.permute(turn).contiguous().permute(back))
    return made
