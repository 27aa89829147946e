"""A row of the suite: what somebody complained about elsewhere, as a function that runs here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Calls = list[tuple[Any, ...]]  # the arguments of one call after the other


@dataclass(frozen=True)
class Row:
    """One complaint.

    ``function(*arguments)`` is attention written out. ``flex(flex_attention, *arguments)`` is the same with
    FlexAttention's call, given compiled or not; None where FlexAttention does not apply. ``calls(device)`` gives
    arguments. ``grad``: gradients of all floating point arguments count. ``graphs``: as many may be compiled.
    ``small``: nothing may be allocated that has a value per query and key. ``left``: effattn rightly leaves it as it is
    written. ``calls_sdpa``: it is no written attention, and SDPA's own kernels are as good as any. ``mode``: of
    torch.compile. ``needs``: "a GPU" or "several GPUs".
    """

    complaint: str
    what: str
    function: Callable[..., Any]
    calls: Callable[[torch.device], Calls]
    flex: Callable[..., Any] | None = None
    grad: bool = False
    graphs: int = 1
    small: bool = False
    left: bool = False
    calls_sdpa: bool = False
    mode: str | None = None
    needs: str = ""

    @property
    def name(self) -> str:
        return f"{self.complaint}: {self.what}"


def tensors(device: torch.device, *shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Normal float32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes)


def qkv(
    device: torch.device, batch: int = 2, heads: int = 2, length: int = 20, width: int = 16, seed: int = 0
) -> tuple[Tensor, ...]:
    """query, key, value [B, H, N, D]."""
    return tensors(device, *[(batch, heads, length, width)] * 3, seed=seed)


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries [N, 1] and keys [1, N]."""
    place = torch.arange(x.shape[2], device=x.device)
    return place[:, None], place[None]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, bias: Tensor | float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, where ``seen`` says which keys count."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v
