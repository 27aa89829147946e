"""The autograd kernel of an op, as ``torch.library.register_autograd`` makes it, with less work on the host per call.

That one goes through the dispatcher a second time, and flattens every argument of an op that takes lists of tensors.
This one calls the op's own kernel where nothing else remains to be dispatched to, and knows from the schema which
arguments are lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet, _after_autograd_keyset, _any_requires_grad, _AutoDispatchBelowAutograd

# after the Autograd key, tensors with one of these as their highest key have nothing left but the op's kernel
_BACKENDS = frozenset(getattr(DispatchKey, name) for name in ("CPU", "CUDA", "XPU") if hasattr(DispatchKey, name))


def autograd_kernel(
    operator: Any,
    kernel: Callable,
    backward: Callable,
    setup_context: Callable | None,
    differentiable: Callable[..., tuple] | None = None,
) -> Callable[..., Any]:
    """A kernel for the key Autograd, called with the keyset first.

    Args:
        operator: the overload, of which all arguments are positional.
        kernel: its definition for every backend.
        backward, setup_context: as ``torch.library.register_autograd`` takes them. Gradients of a list of tensors are
            a list, and so is its part of ``ctx.needs_input_grad``. The last result may be a list of tensors, whose
            gradients are the last arguments of ``backward``.
        differentiable: from the arguments, those with which it runs where gradients are needed.
    """
    arguments = operator._schema.arguments
    assert not any(argument.kwarg_only for argument in arguments), operator
    lists = tuple(place for place, argument in enumerate(arguments) if str(argument.type) == "List[Tensor]")
    defaults = tuple(argument.default_value if argument.has_default_value() else None for argument in arguments)
    returned = [str(result.type) for result in operator._schema.returns]
    assert "List[Tensor]" not in returned[:-1], operator
    single = len(returned) - 1 if returned[-1:] == ["List[Tensor]"] else None  # results before a list
    direct: dict[int, bool] = {}  # by keyset

    def below(keyset: DispatchKeySet, args: Sequence[Any]) -> Any:
        raw = keyset.raw_repr()
        if raw not in direct:
            direct[raw] = (keyset & _after_autograd_keyset).highestPriorityTypeId() in _BACKENDS
        with _AutoDispatchBelowAutograd():
            return kernel(*args) if direct[raw] else operator.redispatch(keyset & _after_autograd_keyset, *args)

    def forward(ctx, keyset, counts, *flat):
        args = _nested(flat, lists, counts)
        result = below(keyset, args)
        if setup_context is not None:
            setup_context(ctx, args, result)
        ctx.counts = counts
        return result if single is None else (*result[:single], *result[single])

    def gradients(ctx, *grads):
        counts, needed = ctx.counts, ctx.needs_input_grad
        ctx.needs_input_grad = _nested(needed[2:], lists, counts)
        try:
            found = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed
        found = found if isinstance(found, tuple) else (found,)
        return None, None, *_flat(found, lists)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    node = type(f"BackwardOf_{operator._opname}", (torch.autograd.Function,), methods)

    def autograd(keyset: DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            args = (*args, *defaults[len(args) :])  # the dispatcher leaves out what equals a default
            if differentiable is not None:
                with _AutoDispatchBelowAutograd():
                    args = differentiable(*args)
            counts = [len(args[place]) for place in lists]
            result = node.apply(keyset, counts, *_flat(args, lists))  # type: ignore[attr-defined]
            return result if single is None else (*result[:single], list(result[single:]))
        return below(keyset, args)

    return autograd


def _flat(values: Sequence[Any], lists: Sequence[int]) -> tuple[Any, ...]:
    """The values with those at ``lists`` replaced by their elements, as ``Function.apply`` finds tensors."""
    flat: list[Any] = []
    for place, value in enumerate(values):
        if place in lists:
            flat.extend(value)
        else:
            flat.append(value)
    return tuple(flat)


def _nested(flat: Sequence[Any], lists: Sequence[int], counts: Sequence[int]) -> tuple[Any, ...]:
    """The inverse of :func:`_flat`: ``counts`` elements for each of ``lists``."""
    values = list(flat)
    for place, count in zip(lists, counts, strict=True):
        values[place : place + count] = [list(values[place : place + count])]
    return tuple(values)
