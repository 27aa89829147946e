"""The attention that is timed: sizes, mask, score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effattn.errors import EffattnError

DTYPES = ("bfloat16", "float16", "float32")
ROWS = 1024  # queries whose masks are looked at: to count pairs, and to compare results


class BenchError(EffattnError):
    """A size, mask, score or peer of a benchmark is invalid."""


@dataclass(frozen=True)
class Mod:
    """A mask_mod or score_mod in FlexAttention's sense, of one problem."""

    function: Callable[..., Any]
    learned: tuple[Tensor, ...] = ()  # tensors that it reads and that need a gradient
    by_batch: bool = True  # whether it may depend on the batch index
    by_head: bool = True


@dataclass(frozen=True)
class Problem:
    """One attention; self-attention over ``tokens``.

    Raises:
        BenchError: sizes do not fit.
    """

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: str
    device: str
    mask: str  # as it was given: "window:1024"
    score: str
    make_mask: Callable[[Problem], Mod | None] = field(repr=False, compare=False)  # None: every pair
    make_score: Callable[[Problem], Mod | None] = field(repr=False, compare=False)  # None: q . k / sqrt(D)
    form: tuple[str, dict[str, Any]] | None = None  # the form of effattn that the mask is, with its parameters
    causal: bool | None = None  # the mask is causal attention, or every pair; None: another one
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "tokens", "head_dim"):
            if getattr(self, name) < 1:
                raise BenchError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise BenchError(f"{self.heads} query heads are no multiple of {self.kv_heads} key/value heads")
        if self.dtype not in DTYPES:
            raise BenchError(f"unknown dtype {self.dtype!r}; allowed: {', '.join(DTYPES)}")

    @property
    def name(self) -> str:
        """The problem in a few words."""
        words = [self.mask, *([self.score] if self.score != "none" else []), f"N {self.tokens:,}"]
        return ", ".join(words)

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    def tensors(self, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, Hq, N, D], key and value [B, Hkv, N, D], the same in every call."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        made = [
            torch.randn(self.batch, heads, self.tokens, self.head_dim, generator=generator, device=self.device).to(
                getattr(torch, self.dtype)
            )
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]
        query, key, value = (tensor.requires_grad_(grad) for tensor in made)
        return query, key, value

    def some_rows(self) -> Tensor:
        """Positions of queries, int64: all of them, or enough to compare and count."""
        if self.tokens <= ROWS:
            return torch.arange(self.tokens, device=self.device)
        return torch.linspace(0, self.tokens - 1, ROWS, device=self.device, dtype=torch.float64).round().long()


def allowed(problem: Problem, mask: Mod | None, rows: Tensor, batch: int, head: int) -> Tensor:
    """bool [len(rows), N]: the keys that queries of one sequence and head may attend to."""
    columns = torch.arange(problem.tokens, device=problem.device)
    if mask is None:
        return torch.ones(len(rows), problem.tokens, dtype=torch.bool, device=problem.device)
    at = [torch.tensor(index, device=problem.device) for index in (batch, head)]
    return mask.function(*at, rows[:, None], columns[None, :]).expand(len(rows), problem.tokens)


@dataclass(frozen=True)
class Pairs:
    """How much work a mask leaves."""

    density: float  # share of all pairs of query and key that the mask allows, from some rows
    rows: Tensor  # the rows that were looked at
    seeing: Tensor  # bool [B, H, len(rows)], on the host: queries with a key (H is 1 if heads share the mask)

    @staticmethod
    def of(problem: Problem, mask: Mod | None) -> Pairs:
        rows = problem.some_rows()
        batches = problem.batch if mask is not None and mask.by_batch else 1
        heads = problem.heads if mask is not None and mask.by_head else 1
        count, seeing = 0, torch.empty(batches, heads, len(rows), dtype=torch.bool)
        for batch in range(batches):
            for head in range(heads):
                for start in range(0, len(rows), 128):
                    part = allowed(problem, mask, rows[start : start + 128], batch, head)
                    count += int(part.sum())
                    seeing[batch, head, start : start + 128] = part.any(-1).cpu()
        return Pairs(count / (batches * heads * len(rows) * problem.tokens), rows, seeing)


def flops(problem: Problem, density: float, backward: bool) -> float:
    """Of the two products of the forward, or the five of the backward, over the allowed pairs."""
    one = 2.0 * problem.batch * problem.heads * problem.tokens**2 * density * problem.head_dim
    return one * (5 if backward else 2)


def traffic(problem: Problem, backward: bool) -> float:
    """Bytes that must be read and written once: query, key, value, output, and in a backward their gradients."""
    sizes = problem.batch * problem.tokens * problem.head_dim * problem.itemsize
    once = sizes * (2 * problem.heads + 2 * problem.kv_heads)
    return float(once * 2 if backward else once)
