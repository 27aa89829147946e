"""Gradients by generated kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from effattn import settings
from effattn.ir.plan import Plan
from effattn.lowering.kernels.score_facts import CapturedTerm, captured_terms, loses_totals
from effattn.lowering.kernels.spec import Tiles
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
    tensor_key,
    too_narrow,
)
from effattn.runtime.selection.block_map import Wanted
from effattn.runtime.selection.triton_block_map import block_map
from effattn.runtime.targets.empty_rows import add_empty_rows
from effattn.runtime.targets.memory_order import allocate, strides_of
from effattn.runtime.targets.target import Gradients
from effattn.runtime.targets.triton.captured import buffers, gradients, inverse_unit, wanted_gradients
from effattn.runtime.targets.triton.limits import UnsupportedCall, why_no_backward
from effattn.runtime.targets.triton.specialise import fits_gluon, in_gluon, over_map, spec_of


@dataclass(frozen=True)
class _Call:
    given: Plan  # see the forward's _Call
    launch: Callable[..., Known]
    terms: tuple[CapturedTerm, ...] = ()
    blocks: tuple[int, int] | None = None  # sizes of the blocks of the block map that it visits
    totals: Callable[..., tuple] | None = None  # finds what the LSE of large scores does not hold, for Gluon kernels
    known: Known | None = None


CALLS = LaunchCache()


def both_ways(call: _Call, shape, captures, scalars, numbers, device: torch.device):
    """The block map of a call, for blocks of queries and for blocks of keys; nothing if tiles come by formula."""
    if call.blocks is None:
        return ()
    given = (call.given.spec, shape, captures, scalars, numbers, *call.blocks, device)
    return tuple(block_map(Wanted(*given, transposed)).tensors() for transposed in (False, True))


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
    if (refusal := why_no_backward(plan.spec, query.shape[3], value.shape[3], tuple(wanted))) is not None:
        raise UnsupportedCall(f"no gradient by generated kernels: {refusal}")
    data = (captures, scalars, numbers, wanted)
    if lse.numel() == 0 or key.shape[2] == 0:
        from effattn.runtime.targets import portable

        return portable.run_backward(plan, grad_out, grad_lse, query, key, value, out, lse, *data)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if too_narrow(query):
        q, k, v, o = (tensor.float() for tensor in (query, key, value, out))
        *found, of_captures = run_backward(plan, grad_out.float(), grad_lse, q, k, v, o, lse, *data, config=config)
        of_query, of_key, of_value = (
            allocate(plan.dispatch.layout, grad, grad.shape, query.dtype).copy_(grad) for grad in found
        )
        return of_query, of_key, of_value, of_captures
    groups = query.shape[1] // key.shape[1]
    inputs = (narrow(query), narrow(key), narrow(value), out, lse, narrow(grad_out))
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    own: tuple = (id(plan), config, *launch_key((*inputs, *captures), scalars, numbers))
    own += (None if grad_lse is None else tensor_key(grad_lse), *wanted)
    layout = plan.dispatch.layout
    of_query, of_key, of_value = (
        tensor.new_empty_strided(tensor.shape, strides_of(layout, tensor.shape)) for tensor in (query, key, value)
    )
    grads = (of_query, of_key, of_value)
    given = [float(number) for number in numbers]
    shape = (*query.shape[:3], key.shape[2])

    def prepared() -> _Call:
        widths = (query.shape[3], value.shape[3])
        spec = spec_of(plan, query.dtype, query.shape[2], groups, *widths, query.device, "backward", config)
        spec = replace(spec, wide=far(*query.shape[:3], *key.shape[:3], *scalars))
        spec = replace(spec, wanted=wanted_gradients(plan.spec, wanted, captures, shape))
        if config is None and captured_terms(spec):
            spec = replace(spec, tiles=beside_captures(spec.tiles))
            spec = over_map(spec) if spec.list_block else spec
        fast = in_gluon(spec, architecture(query.device), settings.current().precise) if config is None else None
        totals = None
        if fast is not None and fits_gluon((*inputs[:3], inputs[5], *grads)):
            totals = kernels.load(spec).module.totals if loses_totals(plan.spec.score) else None
            spec = fast
        blocks = (spec.list_block, spec.list_unit) if spec.list_block else None
        return _Call(plan, kernels.load(spec).module.launch, captured_terms(spec), blocks, totals)

    def started(call: _Call) -> tuple[list[torch.Tensor], Known]:
        if not call.terms:
            with on_device(query.device):
                lists = both_ways(call, shape, captures, scalars, given, query.device)
                found = dict(call.known or {})
                rows: tuple[torch.Tensor, ...] = (lse,)
                if call.totals is not None:
                    greatest, log_totals, found["totals"] = call.totals(
                        *inputs[:2], lse, captures, scalars, given, found.get("totals")
                    )
                    rows = (greatest, log_totals)
                tensors = (*inputs[:4], *rows, inputs[5], grad_lse, grads, captures)
                found["launch"] = call.launch(*tensors, scalars, given, *lists, found.get("launch"))
            return gradients(plan.spec, (), (), None, wanted, (captures, scalars, given), shape), found
        names = (load.name for load in plan.spec.captures)
        filled = buffers(call.terms, dict(zip(names, captures, strict=True)), shape)
        unit = None
        if any(term.whole for term in call.terms):
            unit = inverse_unit(value, grad_out, lse, grad_lse, plan.spec.kept_scale)
        with on_device(query.device):
            lists = both_ways(call, shape, captures, scalars, given, query.device)
            own = (*filled, unit)
            known = call.launch(*inputs, grad_lse, grads, own, captures, scalars, given, *lists, call.known)
        return gradients(plan.spec, call.terms, filled, unit, wanted, (captures, scalars, given), shape), known

    of_captures = CALLS.run(own, prepared, started)
    every = (*grads, of_captures)
    add_empty_rows(plan, every, run_backward, (grad_out, query, key, value, out, lse), data[:3], wanted)
    return every
