"""Softmax in a window and linear attention before it, in float64 over N x N (LoLCATs, arXiv 2410.10254).

For query n at position p, the window W(n) is the last ``window`` keys up to p. If *terraced*, keys are cut into blocks
of ``window``, and W(n) is the keys up to p of its own block and the one before. With c the greatest score in the
window,

    o_n = (gamma sum_{i in W(n)} e^{scale q k_i - c} v_i + sum_{i before W(n)} phi(q) phi(k_i) v_i) / (same without v)

c is part of the model, not only a stabiliser: it makes the greatest weight in the window ``gamma``, whatever the
scores, while the weights before the window are not scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hybrid(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    gamma: Tensor | float,
    *,
    window: int,
    terraced: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Arguments as in :func:`effattn.runtime.ops.window_hybrid.window_hybrid`, with any numbers of queries and keys.

    Returns:
        [B, Hq, Nq, Dv] float64. The last query is at the last key; queries without keys give 0.
    """
    groups = query.shape[1] // key.shape[1]
    query, of_query = query.double(), of_query.double()
    key, value, of_key = (tensor.double().repeat_interleave(groups, 1) for tensor in (key, value, of_key))
    near, far = masks(query.shape[2], key.shape[2], window, terraced)
    scores = (query @ key.mT * scale).masked_fill(~near, -torch.inf)
    seen = near.any(-1)[:, None]
    top = torch.where(seen, scores.amax(-1, keepdim=True), 0.0)
    factor = gamma.double()[:, None, None] if isinstance(gamma, Tensor) else gamma
    weights = factor * (scores - top).exp() + (of_query @ of_key.mT) * far
    return torch.where(seen, weights @ value / torch.where(seen, weights.sum(-1, keepdim=True), 1.0), 0.0)


def masks(q_len: int, k_len: int, window: int, terraced: bool) -> tuple[Tensor, Tensor]:
    """(keys in the window, keys before it), bool [Nq, Nk]."""
    place = torch.arange(q_len)[:, None] + k_len - q_len
    keys = torch.arange(k_len)
    first = (place // window - 1) * window if terraced else place - window + 1
    return (keys >= first) & (keys <= place), keys < torch.minimum(first, place + 1)
