"""Inputs of linear attention that the tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes and meaning of one call."""

    batch: int = 2
    heads: int = 4
    groups: int = 1
    length: int = 57
    keys: int = 0  # 0: as many as ``length``
    features: int = 16
    value_dim: int = 16
    decay: bool = True
    state: bool = False
    causal: bool = True
    normalised: bool = False

    @property
    def meaning(self) -> dict[str, Any]:
        """The arguments that are no tensors."""
        eps = {"normalised": True, "eps": 1e-6} if self.normalised else {}
        return {"scale": 0.5, "causal": self.causal, **eps}

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> tuple[Any, ...]:
        """query, key, value, log_decay, initial_state; positive features if there is a normaliser."""
        made = torch.Generator().manual_seed(seed)
        kv_heads, keys = self.heads // self.groups, self.keys or self.length

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made, dtype=torch.float64)

        query = draw(self.batch, self.heads, self.length, self.features)
        key = draw(self.batch, kv_heads, keys, self.features)
        value = draw(self.batch, kv_heads, keys, self.value_dim)
        state = None
        if self.state:
            state = draw(self.batch, self.heads, self.features, self.value_dim + self.normalised)
        if self.normalised:
            query, key = torch.nn.functional.elu(query) + 1, torch.nn.functional.elu(key) + 1
            if state is not None:
                state[..., -1].abs_().add_(0.5)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        state = None if state is None else state.to(wide).requires_grad_(grad)
        rates = None
        if self.decay:  # the first head forgets nothing, the last one almost everything at once
            rates = -torch.cat([torch.zeros(1), torch.logspace(-2, 0.7, self.heads)])[: self.heads].to(torch.float32)
        query, key, value = (tensor.to(dtype).requires_grad_(grad) for tensor in (query, key, value))
        return query, key, value, rates, state


CASES = {
    "decay": Case(),
    "no decay": Case(decay=False),
    "one token": Case(length=1),
    "one token after a state": Case(length=1, state=True),
    "17 tokens, groups of 3": Case(length=17, heads=6, groups=3, features=20),
    "a state, groups of 4": Case(length=70, heads=4, groups=4, state=True, value_dim=24),
    "groups without decay": Case(length=70, heads=4, groups=4, decay=False, features=24, value_dim=12),
    "normalised": Case(normalised=True),
    "normalised after a state": Case(normalised=True, state=True, decay=False, value_dim=20),
    "normalised, groups of 4": Case(normalised=True, decay=False, heads=4, groups=4),
    "both directions": Case(causal=False, decay=False, normalised=True),
    "other keys": Case(causal=False, decay=False, normalised=True, length=5, keys=90, heads=4, groups=2),
    "other keys, plain": Case(causal=False, decay=False, length=33, keys=70, state=True),
}
