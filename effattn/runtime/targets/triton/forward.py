"""Runs a plan by a kernel generated for the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from effattn import settings
from effattn.ir.plan import Plan
from effattn.lowering.dialects.triton.starting import allocator, multiprocessors
from effattn.lowering.iteration.block_rule import RuleAlone, rule_alone
from effattn.lowering.iteration.tile_ranges import by_formula
from effattn.lowering.kernels.spec import Kind, Tiles
from effattn.runtime import kernels
from effattn.runtime.launching import (
    Known,
    LaunchCache,
    architecture,
    far,
    launch_key,
    narrow,
    on_device,
    too_narrow,
)
from effattn.runtime.selection import triton_steps
from effattn.runtime.selection.block_list import checked_parts
from effattn.runtime.selection.block_map import Wanted
from effattn.runtime.selection.run import select
from effattn.runtime.selection.triton_block_map import lists_in, parts_of_map
from effattn.runtime.targets.memory_order import strides_of
from effattn.runtime.targets.triton.limits import check
from effattn.runtime.targets.triton.specialise import (
    fits_gluon,
    in_gluon,
    kind_of,
    over_given_map,
    spec_of,
    splits_for,
)


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
    inputs = (query, key, value, captures, scalars, numbers)
    # the plan's id, since hashing its expressions is slow; the call keeps the plan alive, so the id stays unique
    own = launch_key((id(plan), config, kind, splits), (query, key, value, *captures), scalars, numbers)
    return CALLS.run(
        own,
        lambda: prepare(plan, *inputs, config=config, kind=kind, splits=splits),
        lambda call: start(call, *inputs, call.known),
    )


def start(call: _Call, query, key, value, captures, scalars, numbers, known: Known | None, blocks=None):
    """(out, LSE) of a call, and what its launcher found out; see :class:`effattn.runtime.targets.target.Target`."""
    with on_device(query.device):
        out, lse = call.empty(call.shape, call.strides, query.dtype), call.empty(*call.of_lse, torch.float32)
        if call.launch is None:
            return (out, lse), None
        if call.widened is not None:
            wide = (query.float(), key.float(), value.float())
            found, lse = run(call.plan, *wide, captures, scalars, numbers, **call.widened)
            return (out.copy_(found), lse), None
        if call.narrowed:
            query, key, value = narrow(query), narrow(key), narrow(value)
        extra: tuple = call.splits
        numbers = [float(number) for number in numbers]
        if call.plan.sparsity.select is not None:
            extra = select(call.plan, query, key, captures, scalars, numbers, triton_steps).tensors()
        elif call.map is not None:
            if blocks is None or not call.takes_map:
                sizes, given = (*query.shape[:3], key.shape[2]), call.map.given(captures, scalars, numbers)
                blocks = parts_of_map(Wanted(call.map.spec, sizes, *given, *call.blocks, query.device))
            else:
                blocks = checked_parts(blocks, call.of_map)
            extra = lists_in(blocks, call.of_map, first=known is None)
        known = call.launch(query, key, value, out, lse, captures, scalars, numbers, *extra, known)
    return (out, lse), known


@dataclass(frozen=True)
class _Call:
    """The common part of calls with the same plan, shapes, strides, dtypes and alignment."""

    plan: Plan
    given: Plan  # the plan that was passed; kept alive so that its id stays unique
    shape: tuple[int, ...]  # of the output, as its strides
    strides: tuple[int, ...]
    of_lse: tuple[tuple[int, ...], tuple[int, ...]]  # its sizes and strides
    empty: Callable[..., torch.Tensor]  # see :func:`allocator`
    launch: Callable[..., Known] | None = None  # None: nothing to compute
    widened: dict[str, Any] | None = None  # arguments of the same call in float32
    narrowed: bool = False
    splits: tuple[int, ...] = ()  # one number for decode
    map: RuleAlone | None = None  # of the block map that it visits
    blocks: tuple[int, int] = (0, 0)  # sizes of its blocks
    of_map: tuple[int, ...] = ()  # the sizes of its ``kv_indices``
    takes_map: bool = False  # whether its blocks are those of the plan, so that the map that is passed serves
    known: Known | None = None


CALLS = LaunchCache()


def prepare(
    plan: Plan,
    query,
    key,
    value,
    captures,
    scalars,
    numbers,
    *,
    config: Tiles | None = None,
    kind: Kind | None = None,
    splits: int | None = None,
) -> _Call:
    """Check a call and choose its kernel; see :func:`run`."""
    given = plan
    batches, heads, q_len, head_dim = query.shape
    kv_heads, k_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    plan = plan.at(k_len)
    check(plan, query, key, value, captures)
    shape = (batches, heads, q_len, value_dim)
    device = query.device
    of_lse = (shape[:3], (max(heads, 1) * max(q_len, 1), max(q_len, 1), 1))
    call = _Call(plan, given, shape, strides_of(plan.dispatch.layout, shape), of_lse, allocator(device))
    if 0 in shape[:3]:
        return call
    if too_narrow(query):
        return replace(call, launch=_never, widened={"config": config, "kind": kind, "splits": splits})
    groups = heads // kv_heads
    kind = kind or kind_of(plan, q_len, groups)
    if kind == "prefill" and not by_formula(plan.spec.rule):
        kind = "listed"
    tensors = (narrow(query), narrow(key), narrow(value))
    spec = spec_of(plan, query.dtype, q_len, groups, head_dim, value_dim, device, kind, config)
    spec = replace(spec, wide=far(*query.shape[:3], *key.shape[:3], *scalars))
    fast = in_gluon(spec, architecture(device), settings.current().precise) if config is None else None
    if fast is not None and fits_gluon(tensors):
        spec = fast
    if kind == "decode" and batches == 1:
        spec = replace(spec, key_ranges=False)  # a single sequence is rarely padded: not worth a second kernel
    parts: tuple[int, ...] = ()
    if kind == "decode":
        parts = (splits or splits_for(batches * kv_heads, k_len, multiprocessors(device)),)
    narrowed = any(narrow is not tensor for narrow, tensor in zip(tensors, (query, key, value), strict=True))
    if spec.kind == "listed" and plan.sparsity.select is None:
        given_map = over_given_map(spec, plan.sparsity.blocks)
        spec = given_map or spec
        sizes = (spec.list_block, spec.list_unit)
        of_map = Wanted(plan.spec, (*query.shape[:3], k_len), captures, scalars, numbers, *sizes, device).shape
        call = replace(call, map=rule_alone(plan.spec), blocks=sizes, of_map=of_map, takes_map=given_map is not None)
    return replace(call, launch=kernels.load(spec).module.launch, narrowed=narrowed, splits=parts)


def _never(*arguments: Any) -> Known:
    raise AssertionError("a call whose tensors are widened first")
