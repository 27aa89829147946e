"""The ops of linear attention: ``torch.ops.effattn.linear`` for many tokens, ``linear_step`` for decode.

    linear(query, key, value, log_decay, initial_state, scale, causal, normalised, eps, layout, target)
        -> (out, final_state)
    linear_step(query, key, value, state, log_decay, scale, normalised, eps, target) -> (out, new_state)

:mod:`effattn.runtime.reference.linear` defines what they compute. States are float32; normalised, their last column is
the running sum of keys. ``linear`` is differentiable in query, key, value and the initial state, also through the final
state, but not in decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effattn.ir.plan import LAYOUTS
from effattn.runtime.ops.attend import NoGradient
from effattn.runtime.ops.autograd import reaches_kernels
from effattn.runtime.ops.registry import Op, register
from effattn.runtime.targets.choice import TARGETS, serving
from effattn.runtime.targets.linear_backward import run_backward
from effattn.runtime.targets.memory_order import allocate
from effattn.runtime.targets.portable.linear import state_dtype
from effattn.runtime.targets.target import LinearTarget

_MEANING = (
    "float scale=1.0, bool causal=True, bool normalised=False, float eps=0.0, str layout='bhnd', str? target=None"
)
SCHEMAS = {
    "linear": (
        "(Tensor query, Tensor key, Tensor value, Tensor? log_decay=None, Tensor? initial_state=None, "
        f"{_MEANING}) -> (Tensor, Tensor)"
    ),
    "linear_backward": (
        "(Tensor? grad_out, Tensor? grad_state, Tensor query, Tensor key, Tensor value, Tensor? log_decay, "
        f"Tensor? initial_state, Tensor out, {_MEANING}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "linear_step": (
        "(Tensor query, Tensor key, Tensor value, Tensor state, Tensor? log_decay=None, float scale=1.0, "
        "bool normalised=False, float eps=0.0, str? target=None) -> (Tensor, Tensor)"
    ),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = True,
    normalised: bool = False,
    eps: float = 0.0,
    layout: str = "bhnd",
    target: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention over many tokens.

    Args:
        query: [B, Hq, N, F]; key: [B, Hk, Nk, F]; value: [B, Hk, Nk, Dv], any strides, one dtype; Hq a multiple of Hk;
            Nk = N if causal. Query and key are features if there is a feature map.
        log_decay: [Hq] float32, logarithm of each head's decay, at most 0; None: no decay. Causal only.
        initial_state: [B, Hq, F, Dv] float32, [B, Hq, F, Dv + 1] if normalised; None: zero.
        scale: of query . key.
        normalised: divide by the sum of a query's weights plus ``eps``.
        layout: memory order of the output, "bhnd" or "bnhd".
        target: a name in ``TARGETS`` of :mod:`effattn.runtime.targets.choice`, or None: by device.

    Returns:
        out [B, Hq, N, Dv] in query's dtype, and the final state in the shape of the initial one. float64 inputs have
        float64 states.

    Raises:
        ValueError: shapes, dtypes or arguments do not match.
    """
    _check(query, key, value, log_decay, initial_state, normalised, causal)
    _check_names(layout, target)
    out = allocate(layout, query, (*query.shape[:3], value.shape[3]))
    chosen = _target(target, query.dtype, query.device, query.shape[3], value.shape[3])
    meaning: dict[str, Any] = {"scale": scale, "causal": causal, "ones": normalised, "eps": eps}
    return out, chosen.run(query, key, value, log_decay, initial_state, out, **meaning)


def linear_fake(
    query,
    key,
    value,
    log_decay=None,
    initial_state=None,
    scale=1.0,
    causal=True,
    normalised=False,
    eps=0.0,
    layout="bhnd",
    target=None,
):
    """Empty outputs of :func:`linear` with its shapes and strides, for any symbolic sizes."""
    return allocate(layout, query, (*query.shape[:3], value.shape[3])), _state_like(query, value, normalised)


def linear_backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    out: Tensor,
    scale: float = 1.0,
    causal: bool = True,
    normalised: bool = False,
    eps: float = 0.0,
    layout: str = "bhnd",
    target: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value (in their dtypes and order ``layout``) and of the initial state ([0] if none)."""
    grads = (
        allocate(layout, query, query.shape),
        allocate(layout, key, key.shape),
        allocate(layout, value, value.shape),
    )
    widest = max(query.shape[3], value.shape[3] + normalised)  # the three calls have different numbers of features
    of_state = run_backward(
        _target(target, query.dtype, query.device, widest, widest),
        grad_out,
        grad_state,
        query,
        key,
        value,
        log_decay,
        initial_state,
        out,
        grads,
        scale=scale,
        causal=causal,
        normalised=normalised,
        eps=eps,
    )
    return *grads, query.new_empty(0, dtype=state_dtype(query)) if of_state is None else of_state


def linear_backward_fake(
    grad_out,
    grad_state,
    query,
    key,
    value,
    log_decay,
    initial_state,
    out,
    scale=1.0,
    causal=True,
    normalised=False,
    eps=0.0,
    layout="bhnd",
    target=None,
):
    grads = [allocate(layout, tensor, tensor.shape) for tensor in (query, key, value)]
    empty = query.new_empty(0, dtype=state_dtype(query))
    return *grads, empty if initial_state is None else _state_like(query, value, normalised)


def linear_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    normalised: bool = False,
    eps: float = 0.0,
    target: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The next few tokens after ``state``, one by one. The cost does not depend on the number of earlier tokens.

    Arguments as in :func:`linear`. Returns out [B, Hq, N, Dv] and the new state; ``state`` is not written. Prefilling N
    tokens and stepping once equals prefilling N + 1. Not differentiable.
    """
    _check(query, key, value, log_decay, state, normalised, True)
    _check_names("bhnd", target)
    chosen = _target(target, query.dtype, query.device, query.shape[3], value.shape[3])
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    meaning: dict[str, Any] = {"scale": scale, "causal": True, "ones": normalised, "eps": eps}
    return out, chosen.run_step(query, key, value, log_decay, state, out, **meaning)


def linear_step_fake(
    query, key, value, state, log_decay=None, scale=1.0, normalised=False, eps=0.0, target=None
):  # fmt: skip
    return query.new_empty((*query.shape[:3], value.shape[3])), _state_like(query, value, normalised)


def _state_like(query: Tensor, value: Tensor, normalised: bool) -> Tensor:
    shape = (query.shape[0], query.shape[1], query.shape[3], value.shape[3] + int(normalised))
    return query.new_empty(shape, dtype=state_dtype(query))


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    normalised: bool,
    causal: bool,
) -> None:
    if not (query.ndim == key.ndim == value.ndim == 4):
        raise ValueError(
            f"query, key and value must be [B, H, N, D], got {query.ndim}, {key.ndim}, {value.ndim} dimensions"
        )
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"shapes do not fit: query {query.shape}, key {key.shape}, value {value.shape}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key/value heads")
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        names = ", ".join(str(tensor.dtype) for tensor in (query, key, value))
        raise ValueError(f"query, key and value must share a floating point dtype: {names}")
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"causal linear attention needs one key per query: {query.shape[2]} queries, {key.shape[2]} keys"
        )
    if log_decay is not None and not causal:
        raise ValueError("decay is defined for causal linear attention: a key after its query has no age")
    if log_decay is not None and (log_decay.shape != query.shape[1:2] or not log_decay.is_floating_point()):
        raise ValueError(f"log_decay must hold a float per query head [{query.shape[1]}], got {list(log_decay.shape)}")
    if state is not None:
        wanted = (query.shape[0], query.shape[1], query.shape[3], value.shape[3] + normalised)
        if state.shape != wanted or state.dtype != state_dtype(query):
            raise ValueError(
                f"a state must be {state_dtype(query)}{list(wanted)}, got {state.dtype}{list(state.shape)}"
                + (" (normalised: the last column is the running sum of keys)" if normalised else "")
            )


def _check_names(layout: str, target: str | None) -> None:
    names = (*TARGETS, None)
    if layout not in LAYOUTS or target not in names:
        raise ValueError(f"layout must be one of {LAYOUTS} and target one of {names}, got {layout!r}, {target!r}")


def _target(
    wanted: str | None, dtype: torch.dtype, device: torch.device, features: int, value_dim: int
) -> LinearTarget:
    """The target for such tensors."""
    return serving(wanted, device.type, lambda target: target.linear.why_not(dtype, features, value_dim)).linear


# -- autograd ---------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, log_decay, state, *meaning = inputs
    if log_decay is not None and log_decay.requires_grad:
        raise NoGradient(
            "effattn::linear has no gradient for decay, and log_decay requires one (a learned decay?); detach it, or "
            "keep this attention as the user wrote it"
        )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, log_decay, state, output[0])
    ctx.meaning = meaning


def _backward(ctx, grad_out, grad_state):
    query, key, value, log_decay, state, out = ctx.saved_tensors
    rest = [None] * (1 + len(ctx.meaning))
    if grad_out is None and grad_state is None:
        return None, None, None, *rest, None
    grad = grad_state if grad_out is None else grad_out
    run = linear_backward if reaches_kernels(grad) else torch.ops.effattn.linear_backward.default
    *grads, of_state = run(grad_out, grad_state, query, key, value, log_decay, state, out, *ctx.meaning)
    return *grads, None, None if state is None else of_state, *[None] * len(ctx.meaning)


def _no_second_gradient(ctx, *grads):
    raise NoGradient("effattn::linear has no second derivative")


def _no_gradient_of_a_step(ctx, *grads):
    raise NoGradient("effattn::linear_step has no gradient; use effattn::linear, which takes and gives states as well")


OPS = {
    "linear": Op(SCHEMAS["linear"], linear, linear_fake, _backward, _setup_context),
    "linear_backward": Op(SCHEMAS["linear_backward"], linear_backward, linear_backward_fake, _no_second_gradient),
    "linear_step": Op(SCHEMAS["linear_step"], linear_step, linear_step_fake, _no_gradient_of_a_step),
}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")
