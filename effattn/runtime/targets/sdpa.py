"""The dense fast path: PyTorch's fused kernels that return the LSE, for plans that are full or causal attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.ir import expr
from effattn.ir.plan import Plan
from effattn.lowering.device import HOST, device_type
from effattn.lowering.schedules.exact import Kind
from effattn.runtime.algebra import evaluate, evaluate_integer
from effattn.runtime.targets.chunks import depends_on_head, names_of_loads, tile_ranges_of
from effattn.runtime.targets.memory_order import strides_of
from effattn.versions import sdpa_settings

MAX_HEAD_DIM = 256  # beyond it, no SDPA kernel avoids N x N scores
MAX_HEADS = 65535  # heads are the second or third dimension of the kernels' grid
FLASH, CUDNN = 1, 3  # results of torch._fused_sdp_choice: values of torch.nn.attention.SDPBackend
ALIGNMENT = 16  # bytes per load of the GPU kernels
MOST_CHOICES = 16  # that are kept for calls of the same sizes: scales may change from call to call
MANY_ROWS = 256  # on a CPU with fewer queries, expanding grouped heads costs more than it saves


def lies_well(sizes: Sequence[Any], strides: Sequence[Any], start: Any, itemsize: int) -> bool:
    """Whether SDPA's GPU kernels accept a tensor [B, H, N, D] with these strides, or a copy would not help.

    The last dimension must be contiguous, and each row must begin at a multiple of 16 bytes. The stride of a dimension
    with one row counts too: that of a transposed key with one row is 1. Other tensors cause an error, or SDPA falls
    back to N x N scores; user code may still multiply them.

    Args:
        sizes, strides, start: in elements; sympy terms if symbolic.
    """
    *steps, along = strides
    if sizes[-1] * itemsize % ALIGNMENT != 0:
        return True  # SDPA pads this width or uses its other kernels
    taken = [step for step, size in zip(steps[:2], sizes, strict=False) if size != 1]
    return along == 1 and all(step * itemsize % ALIGNMENT == 0 for step in (*taken, steps[2], start))


def aligned(x: Tensor) -> Tensor:
    """The tensor, copied unless it :func:`lies_well`."""
    start = x.data_ptr() // x.element_size()
    good = lies_well(x.shape, x.stride(), start, x.element_size())
    return x if good else x.clone(memory_format=torch.contiguous_format)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, chosen: dict[Any, int]
) -> tuple[Tensor, Tensor] | None:
    needs_gradient = query.requires_grad or key.requires_grad or value.requires_grad
    place = (causal, scale, needs_gradient, torch.is_grad_enabled(), sdpa_settings())
    choice = chosen.get(place)
    if choice is None:
        grouped = query.shape[1] != key.shape[1]
        choice = torch._fused_sdp_choice(query, key, value, None, 0.0, causal, scale=scale, enable_gqa=grouped)
        if len(chosen) >= MOST_CHOICES:
            chosen.clear()
        chosen[place] = choice
    found: Sequence[Any]
    if choice == CUDNN:
        found = torch._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
    elif choice == FLASH:
        found = torch._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    else:
        return None
    return found[0], found[1]


def _on_host(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, chosen: dict[Any, int]
) -> tuple[Tensor, Tensor] | None:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, 0.0, causal, scale=scale
    )


def widened_for_lse(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of the CPU flash kernel. Its LSE is off by 1e-4 in half precision, which only suffices for gradients."""
    if not plan.dispatch.lse_is_read or query.dtype not in (torch.bfloat16, torch.float16):
        return query, key, value
    return query.float(), key.float(), value.float()


@dataclass(frozen=True)
class Fused:
    """SDPA kernels without N x N scores that return the LSE, for some device types."""

    run: Callable[[Tensor, Tensor, Tensor, bool, float, dict[Any, int]], tuple[Tensor, Tensor] | None]
    least_rows: int = 0
    lse_in_dtype: bool = False  # see :func:`widened_for_lse`
    grouped_only_in_half: bool = False  # in float32 they need key and value with all query heads
    aligned_only: bool = False  # see :func:`lies_well`
    drops: bool = True  # with dropout they need no N x N scores either


KERNELS: dict[str | None, Fused] = {  # keyed by ``DeviceType.sdpa``
    "fused": Fused(_fused, grouped_only_in_half=True, aligned_only=True),
    "host": Fused(_on_host, MANY_ROWS, lse_in_dtype=True, drops=False),
}


def kernels_on(device: str) -> Fused | None:
    """SDPA's kernels for a device type; None if none are known."""
    return KERNELS.get(device_type(device).sdpa)


def needs_all_heads(device: str, dtype: str, groups: int) -> bool:
    """Whether SDPA avoids N x N scores only if key and value have as many heads as query."""
    kernels = kernels_on(device)
    return groups > 1 and dtype == "float32" and kernels is not None and kernels.grouped_only_in_half


def drops(device: str) -> bool:
    """Whether SDPA with dropout avoids N x N scores on a device type, where it does without."""
    kernels = kernels_on(device)
    return kernels is None or kernels.drops


def needs_alignment(device: str) -> bool:
    """Whether SDPA's kernels take only tensors that :func:`lies_well` accepts."""
    kernels = kernels_on(device)
    return kernels is not None and kernels.aligned_only


def in_layout(out: Tensor, layout: str) -> Tensor:
    """``out`` [B, H, N, D] in a plan's memory order; copied only if needed."""
    if layout == "bnhd":
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


@dataclass(frozen=True)
class Dense:
    """SDPA's kernel for the calls of a plan with the same sizes, strides, dtypes and alignment.

    It computes a score ``c * s`` and a rule that, at these lengths, keeps every key, or is ``k <= q`` with Nq == Nk.
    """

    plan: Plan
    kernel: Fused
    factor: Any  # c
    constant: float | None  # c, if calls do not change it
    number: int | None  # the place of c in their numbers, if it is one of them
    kind: Kind | None  # which keys are kept; None: that depends on the scalars of a call
    lengths: dict[str, int]
    askew: bool  # a tensor has to be copied first
    strides: tuple[int, ...]  # of the output
    chosen: dict[Any, int] = field(default_factory=dict)  # PyTorch's choice, by what it depends on but sizes

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, scalars: Sequence[int], numbers: Sequence[float]
    ) -> tuple[Tensor, Tensor] | None:
        """Output and LSE; None if this call's scalars and numbers, or the user's settings, exclude the kernel."""
        kind, scale = self.kind, self.constant
        if scale is None:
            scale = self._scale(scalars, numbers) if self.number is None else float(numbers[self.number])
        if kind is None:
            kind = dense_kind(self.plan.spec.rule, self._symbols(scalars, numbers))
        # the kernels mask before they scale, so a scale that is not positive would turn -inf into +inf or NaN
        if kind is None or not scale > 0:
            return None
        if self.askew:
            query, key, value = aligned(query), aligned(key), aligned(value)
        dtype, shape = query.dtype, query.shape
        if self.kernel.lse_in_dtype:
            query, key, value = widened_for_lse(self.plan, query, key, value)
        found = self.kernel.run(query, key, value, kind == "causal", scale, self.chosen)
        if found is None:
            return None
        out, lse = found
        if out.dtype is not dtype:
            out = out.to(dtype)
        if lse.shape != shape[:3] or lse.dtype is not torch.float32 or not lse.is_contiguous():
            lse = lse.reshape(shape[:3]).float().contiguous()
        return (out if out.stride() == self.strides else in_layout(out, self.plan.dispatch.layout)), lse

    def _scale(self, scalars: Sequence[int], numbers: Sequence[float]) -> float:
        return float(evaluate(self.factor, self._symbols(scalars, numbers), {}, torch.float64, HOST))

    def _symbols(self, scalars: Sequence[int], numbers: Sequence[float]) -> dict[str, Any]:
        spec = self.plan.spec
        return self.lengths | dict(zip((*spec.scalars, *spec.numbers), (*scalars, *numbers), strict=True))


def dense(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> Dense | None:
    """SDPA's flash or cuDNN kernel for calls like this one; None if it computes none of them."""
    if plan.sparsity.select is not None or 0 in query.shape or 0 in key.shape or query.shape[3] != value.shape[3]:
        return None
    if plan.spec.dropout:
        return None
    kernel = kernels_on(query.device.type)
    if kernel is None or query.shape[2] < kernel.least_rows:
        return None
    factor, bias = scale_and_bias(plan.spec.score)
    bounds = _dense_bounds(plan.spec.rule)
    if factor is None or bias != 0 or bounds is None:
        return None
    lengths = {"Nq": query.shape[2], "Nk": key.shape[2]}
    kind: Kind | None = None
    if not _given(plan, *bounds[0], *(bound for bound, _ in bounds[1])):
        kind = dense_kind(plan.spec.rule, lengths)
        if kind is None:
            return None
    constant = None
    if not _given(plan, factor):
        constant = float(evaluate(factor, lengths, {}, torch.float64, HOST))
    number = plan.spec.numbers.index(factor.name) if getattr(factor, "name", "") in plan.spec.numbers else None
    askew = kernel.aligned_only and any(aligned(x) is not x for x in (query, key, value))
    strides = strides_of(plan.dispatch.layout, query.shape)
    return Dense(plan, kernel, factor, constant, number, kind, lengths, askew, strides)


def _given(plan: Plan, *terms: Any) -> bool:
    """Whether terms read a scalar or number of the call."""
    names = {*plan.spec.scalars, *plan.spec.numbers}
    return any(symbol.name in names for term in terms for symbol in getattr(term, "free_symbols", ()))


@lru_cache(maxsize=1024)
def scale_and_bias(score: Any) -> tuple[Any | None, Any]:
    """(c, bias) if the score is ``c * s + bias``, c free of indices and captures, bias free of s; else (None, 0)."""
    bias, product = sympy.sympify(score).as_independent(expr.s, as_Add=True)
    factor, rest = product.as_independent(expr.s, as_Add=False)
    if rest != expr.s or factor.has(*expr.INDICES) or expr.loads_of(factor):
        return None, sympy.Integer(0)
    return factor, bias


@lru_cache(maxsize=1024)
def _dense_bounds(rule: Any) -> tuple[tuple[Any, ...], tuple[tuple[Any, bool], ...]] | None:
    """(lower bounds, upper bounds with whether each is ``q + constant``); None if the rule has other conditions."""
    ranges = tile_ranges_of(rule)
    bounds = (*ranges.lower, *ranges.upper)
    if ranges.choice or ranges.residual != sympy.true or any(map(names_of_loads, bounds)):
        return None
    if any(depends_on_head(bound) for bound in bounds):
        return None
    return ranges.lower, tuple((bound, not (bound - expr.q).has(expr.q)) for bound in ranges.upper)


def dense_kind(rule: Any, symbols: dict[str, Any]) -> Kind | None:
    """Whether a rule, at the lengths in ``symbols``, keeps every key or is ``k <= q`` with Nq == Nk; None: neither."""
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
