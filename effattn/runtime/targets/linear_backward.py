"""Gradients of linear attention: the forward three times, with other operands (arXiv 2405.17381, appendix).

With L(q, k, v) the causal map and <- time reversal: dQ = L(dO, V, K), dK = <-L(V, dO, Q), dV = <-L(K, Q, dO), all with
the same decay and scale. Only the inputs of the forward are saved and, if normalised, its output. A normaliser is a
column of ones in value: its column of dO is ``-(dO . out) / z``, the others are ``dO / z``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effattn.runtime.targets.portable.linear import state_dtype
from effattn.runtime.targets.target import LinearTarget


def run_backward(
    target: LinearTarget,
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    out: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    causal: bool,
    normalised: bool,
    eps: float,
) -> Tensor | None:
    """Fill ``grads`` of query, key and value. Returns the gradient of the initial state, None if there is none.

    ``target`` is a module with ``run`` as in :mod:`effattn.runtime.targets.portable.linear`; ``out`` is the forward's
    output.
    """
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if normalised:
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=3)
        grad_out = _of_both(target, grad_out, out, query, key, value, log_decay, state, scale, causal, eps)
    of_query, of_key, of_value = grads
    rates = None if log_decay is None else log_decay.to(state_dtype(query))
    meaning: dict[str, Any] = {"scale": scale, "causal": causal}
    turned = None if state is None else state.mT.contiguous()
    target.run(grad_out, value, key, log_decay, turned, of_query, **meaning)
    keys = _PerHead(of_key, query.shape[1])
    target.run(value, grad_out, query, log_decay, None, keys.of_heads, reverse=True, **meaning)
    values = _PerHead(of_value, query.shape[1])
    given = grad_out if normalised and state is not None else grad_out[..., : of_value.shape[3]]
    wide = values.of_heads
    if given.shape[3] != of_value.shape[3]:
        wide = wide.new_empty((*wide.shape[:3], given.shape[3]))
    last = target.run(key, query, given, log_decay, None, wide, reverse=True, **meaning)
    if wide is not values.of_heads:
        values.of_heads.copy_(wide[..., :-1])
    if grad_state is not None:
        _add_final_state(grad_state, key, value, rates, keys, values)
    keys.finish()
    values.finish()
    if state is None:
        return None
    of_state = last * scale
    if rates is not None:
        of_state *= torch.exp(rates)[:, None, None]
    if grad_state is not None:
        of_state += grad_state if rates is None else torch.exp(rates * key.shape[2])[:, None, None] * grad_state
    return of_state


def _of_both(
    target: LinearTarget,
    grad_out: Tensor,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    causal: bool,
    eps: float,
) -> Tensor:
    """The gradients of numerator and normaliser, concatenated to [B, H, N, Dv + 1], from that of their quotient."""
    weight = query.new_empty((*query.shape[:3], 1), dtype=state_dtype(query))
    sums = None if state is None else state[..., -1:].contiguous()
    target.run(query, key, value[..., -1:], log_decay, sums, weight, scale=scale, causal=causal)
    weight += eps
    share = grad_out / weight
    of_weight = -(grad_out * out).sum(dim=3, keepdim=True, dtype=weight.dtype) / weight
    return torch.cat([share, of_weight], dim=3).to(query.dtype)


def _add_final_state(
    grad: Tensor, key: Tensor, value: Tensor, rates: Tensor | None, keys: _PerHead, values: _PerHead
) -> None:
    """Gradients of keys and values through the final state S = sum_j decay^(N-1-j) k_j v_j^T."""
    heads, length = grad.shape[1], key.shape[2]
    key, value = (tensor.repeat_interleave(heads // key.shape[1], dim=1).to(grad.dtype) for tensor in (key, value))
    aged: Any = 1.0
    if rates is not None:
        after = torch.arange(length - 1, -1, -1, device=key.device)
        aged = torch.exp(rates[:, None] * after)[..., None]
    keys.add(value @ grad.mT * aged)
    values.add(key @ grad[..., : values.of_heads.shape[3]] * aged)


class _PerHead:
    """A gradient per query head, summed over the heads of a group at the end. Without groups it is the result."""

    def __init__(self, target: Tensor, heads: int):
        batch, kv_heads, length, width = target.shape
        self.target, self.groups = target, heads // kv_heads
        self.of_heads = target
        if self.groups > 1:
            self.of_heads = target.new_empty((batch, heads, length, width), dtype=state_dtype(target))

    def add(self, more: Tensor) -> None:
        if self.of_heads is self.target and self.target.dtype != more.dtype:
            self.target.copy_(self.target + more)
        else:
            self.of_heads += more

    def finish(self) -> None:
        if self.groups > 1:
            self.target.copy_(self.of_heads.unflatten(1, (-1, self.groups)).sum(dim=2))
