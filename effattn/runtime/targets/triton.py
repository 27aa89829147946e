"""The Triton target: a plan and tensors in, output and LSE out, through a kernel generated for that case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from effattn.errors import EffattnError
from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.fold import UnknownOperation
from effattn.ir.plan import Plan
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.lowering.kernels.backward import no_backward
from effattn.lowering.kernels.source import generate
from effattn.lowering.kernels.spec import (
    DECODE_QUERIES,
    DECODE_ROWS,
    DTYPES,
    MAX_HEAD_DIM,
    KernelSpec,
    Kind,
    Tiles,
    padded,
)
from effattn.lowering.schedules import attention as configs
from effattn.runtime import kernels
from effattn.runtime.launching import (
    Known,
    LaunchCache,
    architecture,
    far,
    multiprocessors,
    narrow,
    on_device,
    tensor_key,
    tf32,
    width,
)
from effattn.runtime.selection.run import select

MAX_SPLITS = 128
KEYS_PER_SPLIT = 256  # a split with fewer keys costs more to combine than it saves
WAVES = 2  # programs that share one multiprocessor: all run at once, and no few are left for the end
MAX_DESCRIPTOR_DIM = 256  # widest side of a box that the copy engine takes


class UnsupportedCall(EffattnError):
    """A call that the Triton target cannot serve; :func:`unsupported` says so beforehand."""


def run(
    plan: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    captures: Sequence[torch.Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
    *,
    config: Tiles | None = None,
    kind: Kind | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by a generated kernel.

    Args:
        query: [B, Hq, Nq, D], any strides. float32, float16 or bfloat16.
        key: [B, Hkv, Nk, D]; value: [B, Hkv, Nk, Dv]; Hq is a multiple of Hkv.
        captures, scalars, numbers: in the order in which the plan names them.
        config, kind, splits: instead of what the tables choose; for measurements.

    Returns:
        out [B, Hq, Nq, Dv] in the dtype of query and the memory order of ``plan.dispatch.layout``, and the natural
        logarithm of the sum of exponentials [B, Hq, Nq] float32, contiguous, -inf for a row without keys.

    Raises:
        UnsupportedCall: dtypes, sizes or expressions that kernels do not serve.
    """
    tensors = (query, key, value, *captures)
    given = [float(number) for number in numbers]
    # a plan is known by its place in memory, which the call keeps for it: to hash its expressions takes longer
    launch_key = (id(plan), config, kind, splits, tf32(), *map(tensor_key, tensors), *map(width, scalars))
    return _CALLS.run(
        launch_key,
        lambda: _prepared(plan, query, key, value, captures, scalars, config, kind, splits),
        lambda call: _started(call, query, key, value, captures, scalars, given),
    )


def _started(call: _Call, query, key, value, captures, scalars, numbers):
    """(out, LSE) of a call, and what its launcher knows."""
    out = query.new_empty(call.shape)
    if call.transposed:
        out = out.transpose(1, 2)
    lse = query.new_empty(call.lse_shape, dtype=torch.float32)
    if call.launch is None:
        return (out, lse), None
    if call.widened is not None:  # the interpreter multiplies no bfloat16 tiles
        wide = (query.float(), key.float(), value.float())
        found, lse = run(call.plan, *wide, captures, scalars, numbers, **call.widened)
        return (out.copy_(found), lse), None
    if call.narrowed:
        query, key, value = narrow(query), narrow(key), narrow(value)
    extra: tuple = call.splits
    with on_device(query.device):
        if call.plan.sparsity.select is not None:
            listed = select(call.plan, query, key, captures, scalars, numbers, target="triton")
            extra = (listed.kv_indices, listed.kv_num_blocks, listed.partial)
        known = call.launch(query, key, value, out, lse, captures, scalars, numbers, *extra, call.known)
    return (out, lse), known


@dataclass(frozen=True)
class _Call:
    """What calls with the same plan, shapes, strides, dtypes and alignment share."""

    plan: Plan
    given: Plan  # as it was passed: while it lives here, no other plan gets its place in memory
    shape: tuple[int, ...]  # of the output as it lies in memory
    lse_shape: tuple[int, ...]
    transposed: bool
    launch: Callable[..., Known] | None = None  # None: nothing to compute
    widened: dict[str, Any] | None = None  # what is asked of the same call in float32
    narrowed: bool = False
    splits: tuple[int, ...] = ()  # one number for decoding
    known: Known | None = None


@dataclass(frozen=True)
class _BackwardCall:
    given: Plan  # as in a call forward
    launch: Callable[..., Known]
    known: Known | None = None


_CALLS = LaunchCache()
_BACKWARD_CALLS = LaunchCache()


def forget() -> None:
    """Choose kernels anew for every call."""
    _CALLS.clear()
    _BACKWARD_CALLS.clear()


def _prepared(
    plan: Plan, query, key, value, captures, scalars, config: Tiles | None, kind: Kind | None, splits: int | None
):
    """Checks a call and chooses its kernel; see :func:`run`."""
    given = plan
    batches, heads, q_len, head_dim = query.shape
    kv_heads, k_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    plan = plan.at(k_len)
    _check(plan, query, key, value, captures)
    transposed = plan.dispatch.layout == "bnhd"
    shape = (batches, q_len, heads, value_dim) if transposed else (batches, heads, q_len, value_dim)
    call = _Call(plan, given, shape, (batches, heads, q_len), transposed)
    if 0 in call.lse_shape:
        return call
    device = query.device
    if device.type == "cpu" and query.dtype == torch.bfloat16:
        return replace(call, launch=_never, widened={"config": config, "kind": kind, "splits": splits})
    groups = heads // kv_heads
    kind = kind or kind_of(plan, q_len, groups)
    tensors = (narrow(query), narrow(key), narrow(value))
    spec = spec_of(plan, query.dtype, q_len, groups, head_dim, value_dim, device, kind, config)
    spec = replace(spec, wide=far(*query.shape[:3], *key.shape[:3], *scalars))
    if kind == "decode" and batches == 1:
        spec = replace(spec, key_ranges=False)  # one short row is seldom padded: not worth a second kernel
    if spec.tiles.descriptors and not (_describable(tensors[1]) and _describable(tensors[2])):
        spec = replace(spec, tiles=replace(spec.tiles, descriptors=False))
    parts: tuple[int, ...] = ()
    if kind == "decode":
        parts = (splits or splits_for(batches * kv_heads, k_len, multiprocessors(device)),)
    narrowed = any(narrow is not tensor for narrow, tensor in zip(tensors, (query, key, value), strict=True))
    return replace(call, launch=kernels.load(spec).module.launch, narrowed=narrowed, splits=parts)


def _never(*arguments: Any) -> Known:
    raise AssertionError("a call whose tensors are widened first")


def run_backward(
    plan: Plan,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    captures: Sequence[torch.Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
    *,
    config: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, in their shapes and dtypes and in the plan's memory order.

    ``out`` and ``lse`` are what the forward returned. What generated kernels do not serve goes through ATen.
    """
    if lse.numel() == 0 or key.shape[2] == 0 or _no_backward(plan.spec, query.shape[3], value.shape[3]) is not None:
        from effattn.runtime.targets import portable_backward

        return portable_backward.run_backward(
            plan, grad_out, grad_lse, query, key, value, out, lse, captures, scalars, numbers
        )
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:  # the interpreter multiplies no bfloat16 tiles
        q, k, v, o = (tensor.float() for tensor in (query, key, value, out))
        found = run_backward(
            plan, grad_out.float(), grad_lse, q, k, v, o, lse, captures, scalars, numbers, config=config
        )
        of_query, of_key, of_value = (_empty_like(plan, grad, query.dtype).copy_(grad) for grad in found)
        return of_query, of_key, of_value
    groups = query.shape[1] // key.shape[1]
    inputs = (narrow(query), narrow(key), narrow(value), out, lse, narrow(grad_out))
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    launch_key: tuple = (id(plan), config, tf32(), *map(tensor_key, (*inputs, *captures)), *map(width, scalars))
    launch_key += (None if grad_lse is None else tensor_key(grad_lse),)
    of_query, of_key, of_value = (_empty_like(plan, tensor, tensor.dtype) for tensor in (query, key, value))
    grads = (of_query, of_key, of_value)
    given = [float(number) for number in numbers]

    def prepared() -> _BackwardCall:
        widths = (query.shape[3], value.shape[3])
        spec = spec_of(plan, query.dtype, query.shape[2], groups, *widths, query.device, "backward", config)
        spec = replace(spec, wide=far(*query.shape[:3], *key.shape[:3], *scalars))
        return _BackwardCall(plan, kernels.load(spec).module.launch)

    def started(call: _BackwardCall) -> tuple[None, Known]:
        with on_device(query.device):
            return None, call.launch(*inputs, grad_lse, grads, captures, scalars, given, call.known)

    _BACKWARD_CALLS.run(launch_key, prepared, started)
    if plan.spec.empty_rows == "mean":
        lost = torch.where(lse[..., None] == -torch.inf, grad_out.float(), 0.0).sum(dim=2)
        of_value.add_(lost.unflatten(1, (-1, groups)).sum(dim=2)[:, :, None] / key.shape[2])
    return grads


_no_backward = lru_cache(maxsize=4096)(no_backward)


def _empty_like(plan: Plan, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    batches, heads, length, width = tensor.shape
    if plan.dispatch.layout == "bnhd":
        return tensor.new_empty((batches, length, heads, width), dtype=dtype).transpose(1, 2)
    return tensor.new_empty(tensor.shape, dtype=dtype)


def kind_of(plan: Plan, q_len: int, groups: int) -> Kind:
    """Few query rows go to the kernel that splits keys over programs, if its tiles fit the plan's ranges."""
    if plan.sparsity.select is not None:
        return "listed"
    if q_len > DECODE_QUERIES or q_len * groups > DECODE_ROWS:
        return "prefill"
    return "decode" if _walk_allows_decode(plan, q_len == 1) else "prefill"


@lru_cache(maxsize=4096)
def _walk_allows_decode(plan: Plan, one_row: bool) -> bool:
    keys = tile_ranges(plan.spec.rule)
    if keys.powers is not None and not one_row:
        return False
    near = (*(keys.near_lower or ()), *keys.near_upper)
    bounds = [*keys.lower, *keys.upper, *near, *([keys.prefix] if keys.prefix is not None else [])]
    bounds += [keys.powers.position] if keys.powers is not None else []
    return not any(bound.has(expr.h) for bound in bounds if hasattr(bound, "has"))


def spec_of(
    plan: Plan,
    dtype: torch.dtype,
    q_len: int,
    groups: int,
    head_dim: int,
    value_dim: int,
    device: torch.device,
    kind: Kind | None = None,
    config: Tiles | None = None,
) -> KernelSpec:
    """The specialisation that serves calls of this kind on ``device``."""
    kind = kind or kind_of(plan, q_len, groups)
    rows = padded(q_len * groups if kind == "decode" else 0)
    return specialise(plan, kind, dtype, head_dim, value_dim, groups, rows, architecture(device), config, tf32())


@lru_cache(maxsize=4096)
def specialise(
    plan: Plan,
    kind: Kind,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    groups: int,
    rows: int,
    arch: str,
    config: Tiles | None,
    tf32: bool,
) -> KernelSpec:
    """The specialisation that a call needs. ``rows``: padded rows of a decode tile, otherwise 16."""
    name = str(dtype).removeprefix("torch.")
    bits = 32 if name == "float32" else 16
    tiles = config or configs.choose(kind, plan, arch, bits, head_dim, value_dim, rows)
    spec = KernelSpec(kind, plan.form, plan.spec, name, head_dim, value_dim, groups, tiles, tf32 and bits == 32)
    if plan.sparsity.select is None:
        return spec
    expand = plan.sparsity.select.expand
    return replace(spec, key_ranges=False, list_block=expand.block, list_unit=expand.unit)


def splits_for(pairs: int, k_len: int, multiprocessors: int) -> int:
    """How many programs share the keys of one (batch, key head) pair: from sizes alone, never from device data."""
    wanted = max(1, WAVES * multiprocessors // max(1, pairs))
    return max(1, min(wanted, MAX_SPLITS, -(-k_len // KEYS_PER_SPLIT)))


def unsupported(spec: AttentionSpec, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why kernels cannot serve such calls; None if they can."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        return f"kernels exist for {', '.join(DTYPES)}, not {name}"
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        return f"head dimensions over {MAX_HEAD_DIM} do not fit on a multiprocessor"
    return _unwritable(spec)


@lru_cache(maxsize=4096)
def _unwritable(spec: AttentionSpec) -> str | None:
    try:
        generate(KernelSpec("prefill", "exact", spec, "bfloat16", 64, 64, 1, Tiles(16, 16, 4, 1)))
    except (UnknownOperation, KeyError) as error:
        return f"no kernel can be written: {error}"
    return None


def _check(plan: Plan, query, key, value, captures) -> None:
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise UnsupportedCall(f"query, key and value must share a dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if query.shape[1] % key.shape[1]:
        raise UnsupportedCall(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key heads")
    reason = unsupported(plan.spec, query.dtype, query.shape[3], value.shape[3])
    if reason:
        raise UnsupportedCall(reason)
    sizes = {"b": query.shape[0], "h": query.shape[1], "q": query.shape[2], "k": key.shape[2]}
    by_name = dict(zip((spec.name for spec in plan.spec.captures), captures, strict=True))
    for name, dim, index in _plain_indices(plan.spec):
        held = by_name[name].shape[dim]
        needed = sizes[index] if isinstance(index, str) else index + 1
        if held != 1 and held < needed:
            raise UnsupportedCall(f"tensor {name!r} has {held} elements along dimension {dim}, {needed} are read")


@lru_cache(maxsize=4096)
def _plain_indices(spec: AttentionSpec) -> tuple[tuple[str, int, str | int], ...]:
    """(load, dimension, index symbol or constant) wherever a load is indexed so simply that kernels test no bounds."""
    found: set[tuple[str, int, str | int]] = set()
    for load in expr.loads_of(spec.score, spec.rule):
        for dim, index in enumerate(load.indices):
            if index in expr.INDICES:
                found.add((load.name, dim, index.name))
            elif index.is_Integer:
                found.add((load.name, dim, int(index)))
    return tuple(sorted(found, key=repr))


def _describable(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor can stand for ``tensor``: 16-byte alignment, a contiguous last dimension."""
    steps = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in steps)
    whole = tensor.numel() > 0 and padded(tensor.shape[3]) <= MAX_DESCRIPTOR_DIM
    return aligned and whole and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0
