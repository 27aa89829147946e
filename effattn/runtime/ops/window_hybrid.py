"""Softmax in a window and linear attention before it (LoLCATs, arXiv 2410.10254): ``torch.ops.effattn.window_linear``.

    window_linear(query, key, value, of_query, of_key, gamma, window, terraced, scale, layout, target) -> (out, total)

In the window, each query block is multiplied with its own key block and the one before, in ATen on any device. The keys
before the window are handled by ``effattn::linear`` on keys shifted to later positions.
:mod:`effattn.runtime.reference.hybrid` defines what it computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.runtime.ops.attend import NoGradient
from effattn.runtime.ops.autograd import reaches_kernels
from effattn.runtime.ops.registry import Op, register
from effattn.runtime.targets.memory_order import allocate
from effattn.runtime.targets.window_blocks import Rest, Window

EPS = 1e-6  # eps of the linear op, whose quotient is multiplied by the denominator again
_MEANING = "int window, bool terraced=False, Scalar scale=1.0, str layout='bhnd', str? target=None"
_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor of_query, Tensor of_key, Tensor gamma"


def window_hybrid(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    gamma: Tensor | float,
    window: int,
    terraced: bool = False,
    scale: float = 1.0,
    layout: str = "bhnd",
    target: str | None = None,
) -> Tensor:
    """Causal attention with a softmax over a window of keys and features for all keys before it.

    Args:
        query: [B, Hq, N, D]; key: [B, Hk, N, D]; value: [B, Hk, N, Dv], one floating-point dtype; Hq a multiple of Hk.
        of_query: [B, Hq, N, F]; of_key: [B, Hk, N, F]: features, nonnegative, in the same dtype.
        gamma: weight of the greatest score in the window, [Hq] floating point or one number, above 0.
        window: keys of the window, including the query's own. terraced: the window begins at the start of the block of
            ``window`` keys before the query's own; blocks are counted from the first key.
        scale: of query . key in the softmax.
        layout: memory order of the output, "bhnd" or "bnhd"; target: of the linear op.

    Returns:
        [B, Hq, N, Dv] in query's dtype. Computed in float32 (float64 for float64 inputs), except for the products of
        the linear op, which are in the features' dtype. Equals softmax attention if the window holds all keys.

    Raises:
        ValueError: shapes or dtypes do not match, or ``window`` is not positive.
    """
    if not isinstance(gamma, Tensor):
        gamma = torch.full((query.shape[1],), gamma, dtype=torch.float32, device=query.device)
    given = (query, key, value, of_query, of_key, gamma)
    return torch.ops.effattn.window_linear(*given, window, terraced, scale, layout, target)[0]


def window_linear(
    query, key, value, of_query, of_key, gamma, window, terraced=False, scale=1.0, layout="bhnd", target=None
):
    """The op of :func:`window_hybrid`; also returns the sum of each query's weights, [B, Hq, N, 1] float32/float64."""
    _check(query, key, value, of_query, of_key, gamma, window)
    wide = torch.promote_types(query.dtype, torch.float32)
    out, total = window_linear_fake(query, key, value, of_query, of_key, gamma, window, layout=layout)
    if query.shape[2] == 0:
        return out, total
    near, near_sum = Window(query.to(wide) * scale, key.to(wide), value.to(wide), window, terraced).sums()
    far, far_sum = _before_window(of_query, of_key, value, wide, window, terraced, target)
    factor = gamma.to(wide)[:, None, None]
    torch.add(factor * near_sum, far_sum, out=total)
    out.copy_((factor * near + far) / total)
    return out, total


def window_linear_fake(
    query, key, value, of_query, of_key, gamma, window, terraced=False, scale=1.0, layout="bhnd", target=None
):
    """Empty outputs of :func:`window_linear` with its shapes and strides, for any symbolic sizes."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = allocate(layout, query, (*query.shape[:3], value.shape[3]))
    return out, query.new_empty((*query.shape[:3], 1), dtype=wide)


def _before_window(
    of_query: Tensor, of_key: Tensor, value: Tensor, wide: torch.dtype, window: int, terraced: bool, target: str | None
) -> tuple[Tensor, Tensor]:
    """Sums over the keys before the window, weights times value and weights alone: [B, Hq, N, Dv], [B, Hq, N, 1]."""
    keys, values = (_later(tensor, _shift(window, terraced)) for tensor in (of_key, value))
    means = torch.ops.effattn.linear(of_query, keys, values, None, None, 1.0, True, True, EPS, "bhnd", target)[0]
    # summed here, because the op rounds to its dtype, in which the sum of many weights would lose digits or overflow
    grouped = of_query.unflatten(1, (of_key.shape[1], -1)).to(wide)
    sums = (grouped * keys.to(wide).cumsum(dim=2)[:, :, None]).sum(dim=-1, keepdim=True).flatten(1, 2)
    far = means.to(wide) * (sums + EPS)
    if terraced:
        rest, rest_sum = Rest(of_query.to(wide), of_key.to(wide), value.to(wide), window).sums()
        far, sums = far + rest, sums + rest_sum
    return far, sums


def window_linear_backward(
    grad, query, key, value, of_query, of_key, gamma, out, total, window, terraced=False, scale=1.0, layout="bhnd",
    target=None,
):  # fmt: skip
    """Gradients of the six tensors, in their shapes and dtypes, from the gradient of ``out``."""
    given = (query, key, value, of_query, of_key)
    if query.shape[2] == 0:
        return (*(torch.zeros_like(tensor) for tensor in given), torch.zeros_like(gamma))
    wide = total.dtype
    by_value = grad.to(wide) / total
    alone = -(by_value * out.to(wide)).sum(dim=-1, keepdim=True)
    factor = gamma.to(wide)[:, None, None]
    softmax = Window(query.to(wide) * scale, key.to(wide), value.to(wide), window, terraced)
    # weights in the window contain the factor, so their gradient without it is the gradient of the factor times it
    q, k, v, of_factor = softmax.gradients(factor * by_value, factor * alone)
    fq, fk, far_v = _before_window_backward(by_value, alone, of_query, of_key, value, window, terraced, target)
    of_gamma = of_factor / gamma.to(wide)
    found = zip((q * scale, k, v + far_v, fq, fk, of_gamma), (*given, gamma), strict=True)
    return tuple(one.to(tensor.dtype).contiguous() for one, tensor in found)


def _before_window_backward(
    by_value: Tensor,
    alone: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    value: Tensor,
    window: int,
    terraced: bool,
    target,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both features and value: the linear op with a column of ones in value."""
    wide, shift, length = by_value.dtype, _shift(window, terraced), of_query.shape[2]
    dtype = (
        torch.float32 if of_query.dtype == torch.float16 else of_query.dtype
    )  # gradients of sums may be very small or large
    values = torch.cat([value, torch.ones_like(value[..., :1])], dim=3)
    operands = (of_query.to(dtype), *(_later(tensor, shift).to(dtype) for tensor in (of_key, values)))
    both = torch.cat([by_value, alone], dim=3).to(dtype)
    grads = torch.ops.effattn.linear_backward(
        both, None, *operands, None, None, both, 1.0, True, False, 0.0, "bhnd", target
    )
    fq, fk, v = (tensor.to(wide) for tensor in grads[:3])
    kept = max(length - shift, 0)
    fk, v = (F.pad(tensor[:, :, length - kept :], (0, 0, 0, length - kept)) for tensor in (fk, v[..., :-1]))
    if terraced:
        rest = Rest(of_query.to(wide), of_key.to(wide), value.to(wide), window).gradients(by_value, alone)
        fq, fk, v = (one + other for one, other in zip((fq, fk, v), rest, strict=True))
    return fq, fk, v


def window_linear_backward_fake(grad, query, key, value, of_query, of_key, gamma, *rest, **named):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value, of_query, of_key, gamma))


def _shift(window: int, terraced: bool) -> int:
    """By how many tokens keys are shifted, so that a query sees only keys before its window; see :class:`Rest`."""
    return 2 * window if terraced else window


def _later(tensor: Tensor, tokens: int) -> Tensor:
    """[B, H, N, D] shifted to later positions by ``tokens``: zeros first, the end cut off."""
    return F.pad(tensor, (0, 0, tokens, 0))[:, :, : tensor.shape[2]]


def _check(query, key, value, of_query, of_key, gamma, window) -> None:
    if window < 1:
        raise ValueError(f"a window has at least one key, got {window}")
    if not all(tensor.ndim == 4 for tensor in (query, key, value, of_query, of_key)):
        raise ValueError("query, key, value and features must be [B, H, N, D]")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.shape[:3] != value.shape[:3] or query.shape[::2] != key.shape[::2] or query.shape[3] != key.shape[3]:
        raise ValueError(f"shapes do not fit: {shapes}")
    if of_query.shape[:3] != query.shape[:3] or of_key.shape[:3] != key.shape[:3]:
        raise ValueError(f"features must stand beside query and key: {shapes}")
    if of_query.shape[3] != of_key.shape[3] or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"features or heads do not fit: {shapes}")
    if len({tensor.dtype for tensor in (query, key, value, of_query, of_key)}) > 1 or not query.is_floating_point():
        raise ValueError("query, key, value and features must share a floating point dtype")
    if gamma.shape != query.shape[1:2] or not gamma.is_floating_point():
        raise ValueError(f"gamma must hold a float per query head [{query.shape[1]}], got {list(gamma.shape)}")


def _setup_context(ctx, inputs, output) -> None:
    *tensors, window, terraced, scale, layout, target = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)
    ctx.meaning = (window, terraced, scale, layout, target)


def _backward(ctx, grad, _grad_total):
    if grad is None:
        return (None,) * (6 + len(ctx.meaning))
    run = window_linear_backward if reaches_kernels(grad) else torch.ops.effattn.window_linear_backward.default
    grads = run(grad, *ctx.saved_tensors, *ctx.meaning)
    return *grads, *[None] * len(ctx.meaning)


def _no_second_gradient(ctx, *grads):
    raise NoGradient("effattn::window_linear has no second derivative")


OPS = {
    "window_linear": Op(
        f"({_TENSORS}, {_MEANING}) -> (Tensor, Tensor)", window_linear, window_linear_fake, _backward, _setup_context
    ),
    "window_linear_backward": Op(
        f"(Tensor grad, {_TENSORS}, Tensor out, Tensor total, {_MEANING}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        window_linear_backward,
        window_linear_backward_fake,
        _no_second_gradient,
    ),
}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")
