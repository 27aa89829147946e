"""Perplexity of a language model on one long text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from effattn.evaluate.tasks.clock import wait


@dataclass(frozen=True)
class Perplexity:
    """The loss on one text."""

    loss: float  # mean negative log likelihood per token, in nats
    tokens: int  # number of predicted tokens
    seconds: float  # of the layers, without the loss

    @property
    def value(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, body: Callable[..., Any] | None = None, chunk: int = 512) -> Perplexity:
    """Perplexity of a transformers causal language model on ``ids``.

    The layers run once over the whole text. Logits are computed for ``chunk`` tokens at a time, so there is no tokens x
    vocabulary tensor.

    Args:
        model: a model with a linear head on the last hidden state (``get_output_embeddings``). The configuration's
            soft-cap is applied to its logits.
        ids: int64 [1, N], N >= 2, on the model's device.
        body: the layers without the head, such as a compiled ``model.base_model``, which is the default.
        chunk: tokens per chunk of logits.

    Raises:
        ValueError: ``ids`` has another shape, or the model has no linear head.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"ids must be [1, N] with N >= 2, got {list(ids.shape)}")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no language model head")
    layers = model.base_model if body is None else body
    wait()
    start = time.perf_counter()
    hidden = layers(ids, use_cache=False).last_hidden_state[0, :-1]
    wait()
    seconds = time.perf_counter() - start
    total = 0.0
    for states, targets in zip(hidden.split(chunk), ids[0, 1:].split(chunk), strict=True):
        total += functional.cross_entropy(logits_of(model, states), targets, reduction="sum").item()
    return Perplexity(total / (ids.shape[1] - 1), ids.shape[1] - 1, seconds)


def logits_of(model: Any, states: Tensor) -> Tensor:
    """float32 logits of last hidden states [..., D]: the head, and the configuration's soft-cap."""
    logits = model.get_output_embeddings()(states).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
