"""Gradients by generated kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effattn import settings
from effattn.ir.plan import Plan
from effattn.lowering.dialects.triton.starting import allocator, multiprocessors
from effattn.lowering.kernels.score_facts import CapturedTerm, captured_terms, loses_totals
from effattn.lowering.kernels.spec import KernelSpec, Tiles
from effattn.lowering.schedules.attention import beside_captures
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
from effattn.runtime.selection.block_map import Wanted
from effattn.runtime.selection.triton_block_map import lists_in, parts_of_map
from effattn.runtime.targets import portable
from effattn.runtime.targets.empty_rows import add_empty_rows, have_gradients
from effattn.runtime.targets.memory_order import allocate, strides_of
from effattn.runtime.targets.target import Differentiated, Gradients
from effattn.runtime.targets.triton.captured import buffers, gradients, inverse_unit, wanted_gradients
from effattn.runtime.targets.triton.limits import UnsupportedCall, why_no_backward
from effattn.runtime.targets.triton.specialise import (
    fits_gluon,
    in_gluon,
    long_tiles,
    over_map,
    spec_of,
    splits_of_long,
)

Data = tuple[Sequence[Tensor], Sequence[int], Sequence[float]]  # captured tensors, scalars, numbers


@dataclass(frozen=True)
class _Call:
    """The common part of gradients with the same plan, shapes, strides, dtypes and alignment."""

    plan: Plan
    wanted: tuple[str, ...]
    instead: Callable[[Differentiated, Data], Gradients] | None = None  # computes calls for which there is no kernel
    grads: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()  # sizes and strides
    empty: Callable[..., Tensor] | None = None  # see :func:`allocator`
    launch: Callable[..., Known] | None = None
    terms: tuple[CapturedTerm, ...] = ()
    blocks: tuple[int, int] | None = None  # sizes of the blocks of the block map that it visits
    maps: tuple[tuple[int, ...], ...] = ()  # sizes of the ``kv_indices`` of both its directions
    totals: Callable[..., tuple] | None = None  # finds what the LSE of large scores does not hold, for Gluon kernels
    of_distances: Callable[..., Known] | None = None  # launches the kernel that reduces ``distances``
    distances: tuple[CapturedTerm, ...] = ()
    tile: int = 0  # its tiles' queries, and keys
    parts: tuple[tuple[int, ...], ...] = ()  # sizes of what programs leave that share the queries of some keys
    narrowed: bool = False
    empty_rows: bool = False  # whether queries without keys have gradients
    known: Known | None = None


CALLS = LaunchCache()


def run_backward(
    plan: Plan,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
    wanted: Sequence[str] = (),
    *,
    config: Tiles | None = None,
) -> Gradients:
    """Gradients of query, key and value, in their shapes and dtypes and in the plan's memory order.

    And those of the captured tensors in ``wanted``, contiguous.

    ``out`` and ``lse`` are what the forward returned. Calls without queries or keys run in ATen.

    Raises:
        UnsupportedCall: :func:`why_no_backward` says why.
    """
    tensors, data = (grad_out, grad_lse, query, key, value, out, lse), (captures, scalars, numbers)
    given = [query, key, value, out, lse, *captures, *(grad for grad in tensors[:2] if grad is not None)]
    # the plan's id, since hashing its expressions is slow; the call keeps the plan alive, so the id stays unique
    own = (id(plan), config, grad_out is None, grad_lse is None, *wanted)
    return CALLS.run(
        launch_key(own, given, scalars, numbers),
        lambda: prepare_backward(plan, *tensors, *data, wanted, config=config),
        lambda call: start_backward(call, *tensors, *data, call.known),
    )


def prepare_backward(
    plan: Plan,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    numbers: Sequence[float],
    wanted: Sequence[str],
    *,
    config: Tiles | None = None,
) -> _Call:
    """Check a call and choose its kernels; see :func:`run_backward`."""
    widths = (query.shape[3], value.shape[3])
    if (refusal := why_no_backward(plan.spec, *widths, tuple(wanted))) is not None:
        raise UnsupportedCall(f"no gradient by generated kernels: {refusal}")
    call = _Call(plan, tuple(wanted))
    if lse.numel() == 0 or key.shape[2] == 0:
        return replace(call, instead=lambda tensors, data: portable.run_backward(plan, *tensors, *data, wanted))
    if too_narrow(query):
        return replace(call, instead=lambda tensors, data: _widened(plan, tensors, data, wanted, config))
    inputs = (query, key, value, torch.zeros_like(out) if grad_out is None else grad_out)
    narrowed = tuple(map(narrow, inputs))
    shape, groups = (*query.shape[:3], key.shape[2]), query.shape[1] // key.shape[1]
    spec = spec_of(plan, query.dtype, query.shape[2], groups, *widths, query.device, "backward", config)
    spec = replace(spec, wide=far(*query.shape[:3], *key.shape[:3], *scalars))
    spec = replace(spec, wanted=wanted_gradients(plan.spec, wanted, captures, shape))
    apart = _for_distances(plan, spec, query.device, config)
    if not captured_terms(spec):
        spec = replace(spec, wanted=())
    elif config is None:
        spec = replace(spec, tiles=beside_captures(spec.tiles))
        spec = over_map(spec) if spec.list_block else spec
    grads = tuple((tuple(each.shape), strides_of(plan.dispatch.layout, each.shape)) for each in inputs[:3])
    fast = in_gluon(spec, architecture(query.device), settings.current().precise) if config is None else None
    totals = None
    written = (torch.empty_strided(*each, dtype=query.dtype, device="meta") for each in grads)
    if fast is not None and fits_gluon((*narrowed, *written)):
        totals = kernels.load(spec).module.totals if loses_totals(plan.spec.score) else None
        spec = fast
    long, pairs = long_tiles(spec), key.shape[0] * key.shape[1]
    splits = splits_of_long(spec, long, pairs, query.shape[2], key.shape[2], multiprocessors(query.device))
    if splits > 1:
        spec, rows = replace(spec, long_tiles=long), long * spec.tiles.block_m
        parts = tuple((splits, *key.shape[:2], rows, width) for width in (spec.block_d, spec.block_dv))
        call = replace(call, parts=parts)
    blocks = (spec.list_block, spec.list_unit) if spec.list_block else None
    maps: tuple[tuple[int, ...], ...] = ()
    if blocks is not None:
        given = (plan.spec, shape, captures, scalars, numbers, *blocks, query.device)
        maps = tuple(Wanted(*given, transposed).shape for transposed in (False, True))
    return replace(
        call,
        grads=grads,
        empty=allocator(query.device),
        launch=kernels.load(spec).module.launch,
        terms=captured_terms(spec),
        blocks=blocks,
        maps=maps,
        totals=totals,
        of_distances=None if apart is None else kernels.load(apart).module.launch,
        distances=() if apart is None else captured_terms(apart),
        tile=0 if apart is None else apart.tiles.block_n,
        narrowed=any(each is not tensor for each, tensor in zip(narrowed, inputs, strict=True)),
        empty_rows=have_gradients(plan.spec),
    )


def _for_distances(plan: Plan, spec: KernelSpec, device: torch.device, config: Tiles | None) -> KernelSpec | None:
    """The kernel for captured tensors that are read by the distance of query and key; None if there are none."""
    square = None if config is None else replace(config, block_m=config.block_n)
    sizes = (spec.groups, spec.head_dim, spec.value_dim)
    found = spec_of(plan, getattr(torch, spec.dtype), 0, *sizes, device, "distances", square)
    found = replace(found, wide=spec.wide, wanted=spec.wanted)
    return found if captured_terms(found) else None


def start_backward(
    call: _Call, grad_out, grad_lse, query, key, value, out, lse, captures, scalars, numbers, known: Known | None
) -> tuple[Gradients, Known | None]:
    """The gradients of a call, and what its launcher found out; see :class:`PreparingTarget`."""
    if call.instead is not None:
        return call.instead((grad_out, grad_lse, query, key, value, out, lse), (captures, scalars, numbers)), None
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    given = (grad_out, query, key, value, out, lse)
    if call.narrowed:
        query, key, value, grad_out = map(narrow, (query, key, value, grad_out))
    device, shape, dtype = query.device, (*query.shape[:3], key.shape[2]), query.dtype
    numbers = [float(number) for number in numbers]
    data = (captures, scalars, numbers)
    assert call.empty is not None
    assert call.launch is not None
    own: tuple = ()
    filled, sums, unit = [], [], None
    if call.wanted:
        by_name = dict(zip((load.name for load in call.plan.spec.captures), captures, strict=True))
        filled, sums = buffers(call.terms, by_name, shape), buffers(call.distances, by_name, shape, call.tile)
    if call.terms:
        if any(term.whole for term in call.terms):
            unit = inverse_unit(value, grad_out, lse, grad_lse, call.plan.spec.kept_scale)
        own = ((*filled, unit),)
    found = {"totals": None, "launch": None, "distances": None} if known is None else known
    rows: tuple[Tensor, ...] = (lse,)
    of_totals = of_distances = None
    with on_device(device):
        of_query, of_key, of_value = grads = [call.empty(*each, dtype) for each in call.grads]
        lists: list[Any] = []
        if call.blocks is not None:
            maps = _both_ways(call.plan, shape, data, call.blocks, device)
            lists = [lists_in(*each, first=known is None) for each in zip(maps, call.maps, strict=True)]
        if call.totals is not None:
            *rows, of_totals = call.totals(query, key, lse, *data, found["totals"])  # type: ignore[assignment]
        parts: list[Tensor] = []
        if call.parts:
            parts = [query.new_empty(sizes, dtype=torch.float32) for sizes in call.parts]
        split = ((*parts, call.parts[0][0]),) if parts else ()
        inputs = (query, key, value, out, *rows, grad_out, grad_lse, grads, *own, *data, *lists, *split)
        launched = call.launch(*inputs, found["launch"])
        for part, grad in zip(parts, grads[1:], strict=False):
            grad[:, :, : part.shape[3]] = part.sum(0)[:, :, : grad.shape[2], : grad.shape[3]]
        if call.of_distances is not None:
            inputs = (query, key, value, out, lse, grad_out, grad_lse, sums, *data)
            of_distances = call.of_distances(*inputs, found["distances"])
    if known is None:
        known = {"totals": of_totals, "launch": launched, "distances": of_distances}
    terms, filled = (*call.terms, *call.distances), [*filled, *sums]
    of_captures = gradients(call.plan.spec, terms, filled, unit, call.wanted, data, shape) if call.wanted else []
    every = (of_query, of_key, of_value, of_captures)
    if call.empty_rows:
        add_empty_rows(call.plan, every, run_backward, given, data, call.wanted)
    return every, known


def _both_ways(plan: Plan, shape, data: Data, blocks: tuple[int, int], device: torch.device) -> list[Tensor]:
    """The block map of a call, for blocks of queries and for blocks of keys."""
    return [parts_of_map(Wanted(plan.spec, shape, *data, *blocks, device, transposed)) for transposed in (False, True)]


def _widened(plan: Plan, tensors: Differentiated, data: Data, wanted: Sequence[str], config: Tiles | None) -> Gradients:
    grads = [None if grad is None else grad.float() for grad in tensors[:2]]
    query, key, value, out, lse = (each.float() for each in tensors[2:])
    wide = (grads[0], grads[1], query, key, value, out, lse)
    *found, of_captures = run_backward(plan, *wide, *data, wanted, config=config)
    of_query, of_key, of_value = (
        allocate(plan.dispatch.layout, grad, grad.shape, tensors[2].dtype).copy_(grad) for grad in found
    )
    return of_query, of_key, of_value, of_captures
