"""The dense fast path: where a plan is plain or causal attention, PyTorch's own fused kernels that return LSE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import sympy
import torch
from torch import Tensor

from effattn.ir import expr
from effattn.ir.plan import Plan
from effattn.lowering.device import HOST, device_type
from effattn.runtime.algebra import bindings, evaluate, evaluate_integer
from effattn.runtime.targets.chunks import depends_on_head, names_of_loads, tile_ranges_of

MAX_HEAD_DIM = 256  # beyond it SDPA has no kernel that avoids N x N scores
MAX_HEADS = 65535  # its kernels are launched with heads as the second or third dimension of a grid
FLASH, CUDNN = 1, 3  # what torch._fused_sdp_choice answers: values of torch.nn.attention.SDPBackend
ALIGNMENT = 16  # bytes that its kernels on a GPU load at once
MANY_ROWS = 256  # on a CPU, with fewer rows, expanding grouped heads costs more than it saves


def sdpa_path(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor] | None:
    """Output and LSE from SDPA's own flash or cuDNN kernel, or None where the plan is more than they compute.

    They take a score ``c * s`` and a rule that, at these lengths, keeps everything, or is ``k <= q`` with Nq == Nk.
    """
    if plan.sparsity.select is not None or 0 in query.shape or 0 in key.shape or query.shape[3] != value.shape[3]:
        return None
    kernel = kernels_on(query.device.type)
    if kernel is None or query.shape[2] < kernel.least_rows:
        return None
    symbols, _ = bindings(plan.spec, captures, scalars, numbers)
    symbols |= {"Nq": query.shape[2], "Nk": key.shape[2]}
    scale = constant_scale(plan.spec.score, symbols)
    kind = dense_kind(plan.spec.rule, symbols)
    # they mask before they scale: a scale that is not positive would make +inf or NaN of -inf
    if scale is None or scale <= 0 or kind is None:
        return None
    dtype = query.dtype
    if kernel.lse_in_dtype:
        query, key, value = widened_for_lse(plan, query, key, value)
    found = kernel.run(query, key, value, kind == "causal", scale)
    if found is None:
        return None
    out, lse = found
    return in_layout(out.to(dtype), plan.dispatch.layout), lse.reshape(query.shape[:3]).float().contiguous()


def lies_well(sizes: Sequence[Any], strides: Sequence[Any], start: Any, itemsize: int) -> bool:
    """Whether SDPA's kernels on a GPU take a tensor [B, H, N, D] as it lies in memory, or no copy is any better.

    Numbers of a row are next to each other and each row begins at a multiple of 16 bytes. A tensor of one row has a
    step to the next one, too, and they look at it: that of a transposed key of one row is 1. Others they refuse, with
    an error, or SDPA falls back to N x N scores. User code may hand them to a product all the same.

    Args:
        sizes, strides, start: of numbers; sympy terms where they are symbolic.
    """
    *steps, along = strides
    if sizes[-1] * itemsize % ALIGNMENT != 0:
        return True  # a width that SDPA pads or leaves to its other kernels
    taken = [step for step, size in zip(steps[:2], sizes, strict=False) if size != 1]
    return along == 1 and all(step * itemsize % ALIGNMENT == 0 for step in (*taken, steps[2], start))


def _aligned(x: Tensor) -> Tensor:
    start = x.data_ptr() // x.element_size()
    good = lies_well(x.shape, x.stride(), start, x.element_size())
    return x if good else x.clone(memory_format=torch.contiguous_format)


def _fused(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor] | None:
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    grouped = query.shape[1] != key.shape[1]
    choice = torch._fused_sdp_choice(query, key, value, None, 0.0, causal, scale=scale, enable_gqa=grouped)
    if choice == CUDNN:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        return out, lse
    if choice == FLASH:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return out, lse
    return None


def _on_host(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor] | None:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def widened_for_lse(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of the CPU flash kernel: in half precision its LSE is off by 1e-4, good for no more than a gradient."""
    if not plan.dispatch.lse_is_read or query.dtype not in (torch.bfloat16, torch.float16):
        return query, key, value
    return query.float(), key.float(), value.float()


@dataclass(frozen=True)
class Fused:
    """SDPA kernels without N x N scores that return the LSE, for some device types."""

    run: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor] | None]
    least_rows: int = 0
    lse_in_dtype: bool = False  # see :func:`widened_for_lse`
    grouped_only_in_half: bool = False  # in float32 they need key and value with all query heads
    aligned_only: bool = False  # see :func:`lies_well`


KERNELS: dict[str | None, Fused] = {  # keyed by ``DeviceType.sdpa``
    "fused": Fused(_fused, grouped_only_in_half=True, aligned_only=True),
    "host": Fused(_on_host, MANY_ROWS, lse_in_dtype=True),
}


def kernels_on(device: str) -> Fused | None:
    """SDPA's kernels for a device type; None if none are known."""
    return KERNELS.get(device_type(device).sdpa)


def needs_all_heads(device: str, dtype: str, groups: int) -> bool:
    """Whether SDPA avoids N x N scores only if key and value have as many heads as query."""
    kernels = kernels_on(device)
    return groups > 1 and dtype == "float32" and kernels is not None and kernels.grouped_only_in_half


def needs_alignment(device: str) -> bool:
    """Whether SDPA's kernels take only tensors that :func:`lies_well` accepts."""
    kernels = kernels_on(device)
    return kernels is not None and kernels.aligned_only


def in_layout(out: Tensor, layout: str) -> Tensor:
    """``out`` [B, H, N, D] in a memory order of plans; copied only if it is in another one."""
    if layout == "bnhd":
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def constant_scale(score: Any, symbols: dict[str, Any]) -> float | None:
    """c if the score is ``c * s``, c known on the host."""
    factor, bias = scale_and_bias(score)
    return None if factor is None or bias != 0 else float(evaluate(factor, symbols, {}, torch.float64, HOST))


@lru_cache(maxsize=1024)
def scale_and_bias(score: Any) -> tuple[Any | None, Any]:
    """(c, bias) if the score is ``c * s + bias``, c without indices and data and bias without s; else (None, 0)."""
    bias, product = sympy.sympify(score).as_independent(expr.s, as_Add=True)
    factor, rest = product.as_independent(expr.s, as_Add=False)
    if rest != expr.s or factor.has(*expr.INDICES) or expr.loads_of(factor):
        return None, sympy.Integer(0)
    return factor, bias


@lru_cache(maxsize=1024)
def _dense_bounds(rule: Any) -> tuple[tuple[Any, ...], tuple[tuple[Any, bool], ...]] | None:
    """Lower bounds, and upper ones with whether each is ``q + constant``; None if the rule is more than these."""
    ranges = tile_ranges_of(rule)
    bounds = (*ranges.lower, *ranges.upper)
    if ranges.choice or ranges.residual != sympy.true or any(map(names_of_loads, bounds)):
        return None
    if any(depends_on_head(bound) for bound in bounds):
        return None
    return ranges.lower, tuple((bound, not (bound - expr.q).has(expr.q)) for bound in ranges.upper)


def dense_kind(rule: Any, symbols: dict[str, Any]) -> Literal["all", "causal"] | None:
    """Whether a rule, at the lengths in ``symbols``, keeps every key or is ``k <= q`` on a square; None: neither."""
    if (bounds := _dense_bounds(rule)) is None:
        return None
    lower, upper = bounds
    q_len, k_len = symbols["Nq"], symbols["Nk"]
    last, first = {**symbols, "q": q_len - 1}, {**symbols, "q": 0}
    if any(evaluate_integer(bound, last) > 0 for bound in lower):
        return None
    starts = [(evaluate_integer(bound, first), diagonal) for bound, diagonal in upper]
    active = [(start, diagonal) for start, diagonal in starts if start < k_len]
    if not active:
        return "all"
    return "causal" if q_len == k_len and all(start == 1 and diagonal for start, diagonal in active) else None
