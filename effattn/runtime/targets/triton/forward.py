"""Runs a plan by a kernel generated for the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from effattn.ir.plan import Plan
from effattn.lowering.kernels.spec import Kind, Tiles
from effattn.runtime import kernels
from effattn.runtime.launching import (
    Known,
    LaunchCache,
    far,
    multiprocessors,
    narrow,
    on_device,
    tensor_key,
    tf32,
    too_narrow,
    width,
)
from effattn.runtime.selection import triton_steps
from effattn.runtime.selection.run import select
from effattn.runtime.targets.triton.limits import check
from effattn.runtime.targets.triton.specialise import describable, kind_of, spec_of, splits_for


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
        captures, scalars, numbers: in the plan's order.
        config, kind, splits: override the tables, for measurements.

    Returns:
        out [B, Hq, Nq, Dv] in query's dtype and the memory order ``plan.dispatch.layout``, and the LSE (natural
        logarithm) [B, Hq, Nq] float32, contiguous, -inf for queries without keys.

    Raises:
        UnsupportedCall: kernels do not support the dtypes, sizes or expressions.
    """
    tensors = (query, key, value, *captures)
    given = [float(number) for number in numbers]
    # the plan's id, since hashing its expressions is slow; the call keeps the plan alive, so the id stays unique
    launch_key = (id(plan), config, kind, splits, tf32(), *map(tensor_key, tensors), *map(width, scalars))
    return CALLS.run(
        launch_key,
        lambda: _prepared(plan, query, key, value, captures, scalars, config, kind, splits),
        lambda call: _started(call, query, key, value, captures, scalars, given),
    )


def _started(call: _Call, query, key, value, captures, scalars, numbers):
    """(out, LSE) of a call, and what its launcher found out."""
    out = query.new_empty(call.shape)
    if call.transposed:
        out = out.transpose(1, 2)
    lse = query.new_empty(call.lse_shape, dtype=torch.float32)
    if call.launch is None:
        return (out, lse), None
    if call.widened is not None:
        wide = (query.float(), key.float(), value.float())
        found, lse = run(call.plan, *wide, captures, scalars, numbers, **call.widened)
        return (out.copy_(found), lse), None
    if call.narrowed:
        query, key, value = narrow(query), narrow(key), narrow(value)
    extra: tuple = call.splits
    with on_device(query.device):
        if call.plan.sparsity.select is not None:
            listed = select(call.plan, query, key, captures, scalars, numbers, triton_steps)
            extra = listed.tensors()
        known = call.launch(query, key, value, out, lse, captures, scalars, numbers, *extra, call.known)
    return (out, lse), known


@dataclass(frozen=True)
class _Call:
    """The common part of calls with the same plan, shapes, strides, dtypes and alignment."""

    plan: Plan
    given: Plan  # the plan that was passed; kept alive so that its id stays unique
    shape: tuple[int, ...]  # of the output in memory order
    lse_shape: tuple[int, ...]
    transposed: bool
    launch: Callable[..., Known] | None = None  # None: nothing to compute
    widened: dict[str, Any] | None = None  # arguments of the same call in float32
    narrowed: bool = False
    splits: tuple[int, ...] = ()  # one number for decode
    known: Known | None = None


CALLS = LaunchCache()


def _prepared(
    plan: Plan, query, key, value, captures, scalars, config: Tiles | None, kind: Kind | None, splits: int | None
):
    """Check a call and choose its kernel; see :func:`run`."""
    given = plan
    batches, heads, q_len, head_dim = query.shape
    kv_heads, k_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    plan = plan.at(k_len)
    check(plan, query, key, value, captures)
    transposed = plan.dispatch.layout == "bnhd"
    shape = (batches, q_len, heads, value_dim) if transposed else (batches, heads, q_len, value_dim)
    call = _Call(plan, given, shape, (batches, heads, q_len), transposed)
    if 0 in call.lse_shape:
        return call
    device = query.device
    if too_narrow(query):
        return replace(call, launch=_never, widened={"config": config, "kind": kind, "splits": splits})
    groups = heads // kv_heads
    kind = kind or kind_of(plan, q_len, groups)
    tensors = (narrow(query), narrow(key), narrow(value))
    spec = spec_of(plan, query.dtype, q_len, groups, head_dim, value_dim, device, kind, config)
    spec = replace(spec, wide=far(*query.shape[:3], *key.shape[:3], *scalars))
    if kind == "decode" and batches == 1:
        spec = replace(spec, key_ranges=False)  # a single sequence is rarely padded: not worth a second kernel
    if spec.tiles.descriptors and not (describable(tensors[1]) and describable(tensors[2])):
        spec = replace(spec, tiles=replace(spec.tiles, descriptors=False))
    parts: tuple[int, ...] = ()
    if kind == "decode":
        parts = (splits or splits_for(batches * kv_heads, k_len, multiprocessors(device)),)
    narrowed = any(narrow is not tensor for narrow, tensor in zip(tensors, (query, key, value), strict=True))
    return replace(call, launch=kernels.load(spec).module.launch, narrowed=narrowed, splits=parts)


def _never(*arguments: Any) -> Known:
    raise AssertionError("a call whose tensors are widened first")
