"""Linear attention in float64 by its definitions: the ground truth for the op, its targets and gradients.

With ``decay = exp(log_decay)``, one per query head (the recurrence of Lightning attention, arXiv 2405.17381 section 3;
without decay that of Katharopoulos et al., arXiv 2006.16236):

    S_t = decay * S_(t-1) + k_t v_t^T       the state, [F, Dv]
    o_t = scale * q_t^T S_t                 which is ((scale * Q K^T) * M) V with M_ij = decay^(i-j) where i >= j

Normalised, value gets a column of ones: the state is [F, Dv + 1], its last column z the running sum of keys, and
``o_t = scale * q_t^T S_t / (scale * q_t^T z_t + eps)``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quadratic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal: bool = True,
    normalised: bool = False,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output and final state by the N x N definition.

    Args:
        query: [B, Hq, N, F]; key: [B, Hk, Nk, F]; value: [B, Hk, Nk, Dv]; Hq a multiple of Hk; Nk = N if causal.
        log_decay: [Hq], at most 0; causal only.
        initial_state: [B, Hq, F, Dv], or [B, Hq, F, Dv + 1] if normalised.

    Returns:
        out [B, Hq, N, Dv] and final state [B, Hq, F, Dv or Dv + 1], float64.
    """
    query, key, value = _wide(query, key, value, normalised)
    length, keys = query.shape[2], key.shape[2]
    rates = torch.zeros(query.shape[1], dtype=torch.float64, device=query.device)
    rates = rates if log_decay is None else log_decay.double()
    rows = torch.arange(length, device=query.device)[:, None]
    distance = rows - torch.arange(keys, device=query.device)
    kept = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    weights = torch.where(kept, torch.exp(rates[:, None, None] * distance.clamp(min=0)), 0.0)
    out = ((query @ key.mT) * weights) @ value
    after = torch.arange(keys - 1, -1, -1, device=query.device)
    state = (key * torch.exp(rates[:, None] * after)[..., None]).mT @ value
    if initial_state is not None:
        aged = torch.exp(rates[:, None] * (rows[:, 0] + 1))[..., None]
        out = out + aged * (query @ initial_state.double())
        state = state + torch.exp(rates * keys)[:, None, None] * initial_state.double()
    return _finished(out * scale, normalised, eps), state


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalised: bool = False,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output and final state token by token; causal. Arguments and results as in :func:`quadratic`."""
    query, key, value = _wide(query, key, value, normalised)
    batch, heads, _, features = query.shape
    decay = torch.ones(heads, dtype=torch.float64, device=query.device)
    decay = decay if log_decay is None else torch.exp(log_decay.double())
    state = query.new_zeros(batch, heads, features, value.shape[3])
    state = state if initial_state is None else initial_state.double()
    rows = []
    for q, k, v in zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True):
        state = decay[:, None, None] * state + k[..., None] * v[..., None, :]
        rows.append((q[..., None, :] @ state)[..., 0, :])
    out = torch.stack(rows, dim=2) if rows else value.new_zeros(batch, heads, 0, value.shape[3])
    return _finished(out * scale, normalised, eps), state


def _wide(query: Tensor, key: Tensor, value: Tensor, normalised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """float64 tensors with heads of key and value repeated; if normalised, value gets a column of ones."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return query, key, torch.cat([value, torch.ones_like(value[..., :1])], dim=3) if normalised else value


def _finished(out: Tensor, normalised: bool, eps: float) -> Tensor:
    return out[..., :-1] / (out[..., -1:] + eps) if normalised else out
