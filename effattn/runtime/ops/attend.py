"""The op ``torch.ops.effattn.attend``: its kernel, fake kernel and gradient.

    attend(query, key, value, captures, scalars, numbers, plan) -> (out, lse)

``numbers`` is ``Scalar[]`` rather than ``float[]``. A scale from ``item()`` of a 0-d tensor is an unbacked SymFloat
under ``torch.compile``, which ``float[]`` refuses; and ``Scalar[]`` does not specialise a symbolic size that a scale
is computed from. Floats, ints, SymFloats and SymInts may be passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from effattn.errors import EffattnError
from effattn.ir.chosen import over_chosen
from effattn.ir.plan import Plan
from effattn.ir.refusal import Refusal
from effattn.runtime.algebra import check_counts
from effattn.runtime.launching import LaunchCache, launch_key
from effattn.runtime.ops.autograd import reaches_kernels
from effattn.runtime.ops.registry import Op, register
from effattn.runtime.targets import sdpa
from effattn.runtime.targets.choice import ANYWHERE, TARGETS, asked_for, named, serving, why_generated
from effattn.runtime.targets.first_keys import empty_first_keys, lacks_first_keys, unread_first_keys, with_first_keys
from effattn.runtime.targets.memory_order import allocate, allocate_output
from effattn.runtime.targets.target import Differentiated, Gradients, PreparingTarget, Target

SCHEMAS = {
    "attend": (
        "(Tensor query, Tensor key, Tensor value, Tensor[] captures, SymInt[] scalars, Scalar[] numbers, str plan,"
        " Tensor? blocks=None) -> (Tensor, Tensor)"
    ),
    "attend_backward": (
        "(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
        " Tensor[] captures, SymInt[] scalars, Scalar[] numbers, str plan, bool[] wanted)"
        " -> (Tensor, Tensor, Tensor, Tensor[])"
    ),
}


class NoGradient(EffattnError):
    """A gradient was requested that this op does not compute."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    numbers: Sequence[float],
    plan: str,
    blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of one attention.

    Args:
        query: [B, Hq, Nq, D], any strides; key: [B, Hkv, Nk, D]; value: [B, Hkv, Nk, Dv]; one floating-point dtype.
        captures, scalars, numbers: in the plan's order.
        plan: the result of :meth:`Plan.encode`.
        blocks: what ``effattn::block_map`` made of the same mask and sizes; None: made here where it is needed.

    Returns:
        out [B, Hq, Nq, Dv] in query's dtype and the plan's memory order; lse [B, Hq, Nq] float32, natural logarithm,
        -inf for queries without keys.

    Raises:
        PlanError: the plan was not written by this version.
        TargetError: the plan names a target that does not exist, or cannot run on this device.
        ValueError: shapes or counts do not match.
    """
    place = launch_key(plan, (query, key, value, *captures), scalars, numbers)
    inputs = (query, key, value, captures, scalars, numbers)
    call = CALLS.find(place)
    if call is not None:
        return _start(call, *inputs, blocks)[0]
    return CALLS.run(place, lambda: _prepare(plan, *inputs), lambda call: _start(call, *inputs, blocks))


@dataclass(frozen=True)
class _Call:
    """What is decided once for all calls, or their gradients, of one plan, sizes, strides, dtypes and alignment."""

    plan: Plan  # the one for this number of keys
    lacks_first_keys: bool
    unread: bool = False  # whether the last captured tensor, the first keys, is for other numbers of keys
    dense: sdpa.Dense | None = None  # SDPA's kernel, if it computes such calls
    target: Target | None = None  # what runs them otherwise
    preparing: PreparingTarget | None = None  # the same target, if it has prepared them
    prepared: Any = None
    wanted: tuple[str, ...] = ()  # captured tensors that need a gradient
    known: Any = None


CALLS = LaunchCache()


def _prepare(plan: str, query, key, value, captures, scalars, numbers) -> _Call:
    _check_shapes(query, key, value)
    decoded = Plan.decode(plan).at(key.shape[2])
    lacks, unread = lacks_first_keys(decoded, captures), unread_first_keys(Plan.decode(plan), decoded, captures)
    captures = captures[:-1] if unread else captures
    check_counts(decoded.spec.given if lacks else decoded.spec, captures, scalars, numbers)
    dense = _dense(decoded, query, key, value)
    call = _Call(decoded, lacks, unread, dense)
    if dense is not None:
        return call
    if lacks:
        captures = [*captures, empty_first_keys(decoded, query)]
    target = target_of(decoded, query, value)
    preparing = _preparing(target)
    if preparing is None:
        return replace(call, target=target)
    prepared = preparing.prepare(decoded, query, key, value, captures, scalars, numbers)
    return replace(call, target=target, preparing=preparing, prepared=prepared)


def _preparing(target: Any) -> PreparingTarget | None:
    """The target, if it is one that prepares calls. (``isinstance`` of a protocol is slow.)"""
    return target if hasattr(target, "prepare") else None


def _dense(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> sdpa.Dense | None:
    """SDPA's kernel, if it computes calls like this one and none that was asked for, or is faster, goes before it."""
    wanted, device = plan.dispatch.target, query.device
    if wanted is not None and named(wanted).alone:
        return None
    if (found := sdpa.dense(plan, query, key, value)) is None:
        return None
    given = plan.dispatch.kernel, asked_for(wanted, device.type), device, plan.spec, found.kind
    return found if why_generated(*given, query.dtype, query.shape[3], query.shape[2]) is None else None


def _start(call: _Call, query, key, value, captures, scalars, numbers, blocks) -> tuple[tuple[Tensor, Tensor], Any]:
    if call.lacks_first_keys:
        captures = with_first_keys(call.plan, query, key, captures, scalars, numbers)
    elif call.unread:
        captures = captures[:-1]
    if call.preparing is not None:
        return call.preparing.start(call.prepared, query, key, value, captures, scalars, numbers, call.known, blocks)
    done = None if call.dense is None else call.dense.run(query, key, value, scalars, numbers)
    if done is None:
        target = call.target or target_of(call.plan, query, value)
        done = target.run(call.plan, query, key, value, captures, scalars, numbers)
    return done, None


def attend_fake(query, key, value, captures, scalars, numbers, plan, blocks=None):
    """Empty outputs of :func:`attend` with its shapes and strides, for any symbolic sizes."""
    return allocate_output(Plan.decode(plan), query, value)


def attend_backward(
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
    plan: str,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of query, key and value, in their shapes and dtypes, in the plan's memory order.

    And those of the captured tensors for which ``wanted`` holds (one bool for each), contiguous, in their dtypes.
    """
    inputs: Differentiated = (grad_out, grad_lse, query, key, value, out, lse)
    tensors = [query, key, value, out, lse, *captures]
    if grad_out is not None:
        tensors.append(grad_out)
    if grad_lse is not None:
        tensors.append(grad_lse)
    place = launch_key((plan, grad_out is None, grad_lse is None, *wanted), tensors, scalars, numbers)
    data = (captures, scalars, numbers)
    call = BACKWARD_CALLS.find(place)
    if call is not None:
        return _start_backward(call, inputs, *data)[0]
    prepare = lambda: _prepare_backward(plan, inputs, *data, wanted)  # noqa: E731
    return BACKWARD_CALLS.run(place, prepare, lambda call: _start_backward(call, inputs, *data))


BACKWARD_CALLS = LaunchCache()


def _prepare_backward(plan: str, inputs: Differentiated, captures, scalars, numbers, wanted: Sequence[bool]) -> _Call:
    query, key, value = inputs[2:5]
    decoded = Plan.decode(plan).at(key.shape[2])
    # the plan may read one more, which the op itself computes
    names = tuple(load.name for load, needed in zip(decoded.spec.captures, wanted, strict=False) if needed)
    lacks, unread = lacks_first_keys(decoded, captures), unread_first_keys(Plan.decode(plan), decoded, captures)
    captures = captures[:-1] if unread else captures
    target = target_of(decoded, query, value)
    if target.why_no_backward(decoded.spec, query.shape[3], value.shape[3], names) is not None:
        target = TARGETS[ANYWHERE]
    call, preparing = _Call(decoded, lacks, unread, target=target, wanted=names), _preparing(target)
    if preparing is None:
        return call
    if lacks:
        captures = [*captures, empty_first_keys(decoded, query)]
    prepared = preparing.prepare_backward(decoded, *inputs, captures, scalars, numbers, names)
    return replace(call, preparing=preparing, prepared=prepared)


def _start_backward(call: _Call, inputs: Differentiated, captures, scalars, numbers) -> tuple[Gradients, Any]:
    if call.lacks_first_keys:
        captures = with_first_keys(call.plan, inputs[2], inputs[3], captures, scalars, numbers)
    elif call.unread:
        captures = captures[:-1]
    if call.preparing is not None:
        return call.preparing.start_backward(call.prepared, *inputs, captures, scalars, numbers, call.known)
    assert call.target is not None
    return call.target.run_backward(call.plan, *inputs, captures, scalars, numbers, call.wanted), None


def attend_backward_fake(grad_out, grad_lse, query, key, value, out, lse, captures, scalars, numbers, plan, wanted):
    layout = Plan.decode(plan).dispatch.layout
    of_captures = [load.new_empty(load.shape) for load, needed in zip(captures, wanted, strict=True) if needed]
    return *(allocate(layout, tensor, tensor.shape) for tensor in (query, key, value)), of_captures


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not (query.ndim == key.ndim == value.ndim == 4):
        raise ValueError(
            f"query, key and value must be [B, H, N, D], got {query.ndim}, {key.ndim}, {value.ndim} dimensions"
        )
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"shapes do not fit: query {query.shape}, key {key.shape}, value {value.shape}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key/value heads")


def target_of(plan: Plan, query: Tensor, value: Tensor) -> Target:
    """The target that runs a plan on these tensors. Raises TargetError if the plan names one that cannot."""

    def why_not(target: Target) -> Refusal | None:
        return target.why_not(plan.spec, query.dtype, query.shape[3], value.shape[3])

    return serving(plan.dispatch.target, query.device.type, why_not)


def _over_chosen_keys(query, key, value, captures, scalars, numbers, plan, blocks):
    """The arguments of the same call over keys that are chosen before it, so that its backward visits the same."""
    if not Plan.decode(plan).selects:
        return query, key, value, captures, scalars, numbers, plan, blocks
    sizes = (key.shape[2], query.shape[1], key.shape[1])
    chooses, number, plan = (_in_two if isinstance(sizes[0], int) else _in_two.__wrapped__)(plan, *sizes)
    if chooses is not None:
        chosen = torch.ops.effattn.chosen_keys.default(query, key, captures, scalars, numbers, chooses)
        captures = [*captures, *chosen[:number]]
    return query, key, value, captures, scalars, numbers, plan, None


@lru_cache(maxsize=4096)
def _in_two(plan: str, k_len: int, heads: int, kv_heads: int) -> tuple[str | None, int, str]:
    """The plan that chooses keys in calls with so many, None if there is no choice; how many captured tensors say
    which; and the plan over these keys.
    """
    whole = Plan.decode(plan).at(k_len)
    if not whole.selects:
        return None, 0, whole.encode()
    over = over_chosen(whole, heads, kv_heads)
    return whole.encode(), len(over.spec.captures) - len(whole.spec.captures), over.encode()


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, captures, scalars, numbers, plan, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, *captures)
    ctx.scalars, ctx.numbers, ctx.plan = scalars, numbers, plan


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, *captures = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return None, None, None, [None] * len(captures), None, None, None, None
    wanted = list(ctx.needs_input_grad[3])
    grad = grad_lse if grad_out is None else grad_out
    run = attend_backward if reaches_kernels(grad) else torch.ops.effattn.attend_backward.default
    *grads, found = run(
        grad_out, grad_lse, query, key, value, out, lse, captures, ctx.scalars, ctx.numbers, ctx.plan, wanted
    )
    of_captures = iter(found)
    return *grads, [next(of_captures) if needed else None for needed in wanted], None, None, None, None


def _no_second_gradient(ctx, *grads):
    raise NoGradient("effattn::attend has no second derivative")


OPS = {
    "attend": Op(SCHEMAS["attend"], attend, attend_fake, _backward, _setup_context, _over_chosen_keys),
    "attend_backward": Op(SCHEMAS["attend_backward"], attend_backward, attend_backward_fake, _no_second_gradient),
}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")
