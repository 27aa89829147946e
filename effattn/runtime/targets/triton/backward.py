"""Gradients by generated kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from effattn.ir.plan import Plan
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime import kernels
from effattn.runtime.launching import Known, LaunchCache, far, narrow, on_device, tensor_key, tf32, too_narrow, width
from effattn.runtime.targets.memory_order import allocate
from effattn.runtime.targets.triton.limits import UnsupportedCall, why_no_backward
from effattn.runtime.targets.triton.specialise import spec_of


@dataclass(frozen=True)
class _Call:
    given: Plan  # see the forward's _Call
    launch: Callable[..., Known]
    known: Known | None = None


CALLS = LaunchCache()


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

    ``out`` and ``lse`` are what the forward returned. Calls without queries or keys run in ATen.

    Raises:
        UnsupportedCall: :func:`why_no_backward` says why.
    """
    if (refusal := why_no_backward(plan.spec, query.shape[3], value.shape[3])) is not None:
        raise UnsupportedCall(f"no gradient by generated kernels: {refusal}")
    if lse.numel() == 0 or key.shape[2] == 0:
        from effattn.runtime.targets import portable

        return portable.run_backward(plan, grad_out, grad_lse, query, key, value, out, lse, captures, scalars, numbers)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if too_narrow(query):
        q, k, v, o = (tensor.float() for tensor in (query, key, value, out))
        found = run_backward(
            plan, grad_out.float(), grad_lse, q, k, v, o, lse, captures, scalars, numbers, config=config
        )
        of_query, of_key, of_value = (
            allocate(plan.dispatch.layout, grad, grad.shape, query.dtype).copy_(grad) for grad in found
        )
        return of_query, of_key, of_value
    groups = query.shape[1] // key.shape[1]
    inputs = (narrow(query), narrow(key), narrow(value), out, lse, narrow(grad_out))
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    launch_key: tuple = (id(plan), config, tf32(), *map(tensor_key, (*inputs, *captures)), *map(width, scalars))
    launch_key += (None if grad_lse is None else tensor_key(grad_lse),)
    of_query, of_key, of_value = (
        allocate(plan.dispatch.layout, tensor, tensor.shape) for tensor in (query, key, value)
    )
    grads = (of_query, of_key, of_value)
    given = [float(number) for number in numbers]

    def prepared() -> _Call:
        widths = (query.shape[3], value.shape[3])
        spec = spec_of(plan, query.dtype, query.shape[2], groups, *widths, query.device, "backward", config)
        spec = replace(spec, wide=far(*query.shape[:3], *key.shape[:3], *scalars))
        return _Call(plan, kernels.load(spec).module.launch)

    def started(call: _Call) -> tuple[None, Known]:
        with on_device(query.device):
            return None, call.launch(*inputs, grad_lse, grads, captures, scalars, given, call.known)

    CALLS.run(launch_key, prepared, started)
    if plan.spec.empty_rows == "mean":
        lost = torch.where(lse[..., None] == -torch.inf, grad_out.float(), 0.0).sum(dim=2)
        of_value.add_(lost.unflatten(1, (-1, groups)).sum(dim=2)[:, :, None] / key.shape[2])
    return grads
