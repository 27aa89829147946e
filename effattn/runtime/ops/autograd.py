"""The autograd kernel of an op, as ``torch.library.register_autograd`` makes it, with less work on the host per call.

That one goes through the dispatcher a second time, and flattens every argument of an op that takes lists of tensors.
This one calls the op's own kernel where nothing else remains to be dispatched to, and knows from the schema which
arguments are lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _after_autograd_keyset,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _dispatch_keys,
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled

# after the Autograd key, tensors with one of these as their highest key have nothing left but the op's kernel
_BACKENDS = frozenset(getattr(DispatchKey, name) for name in ("CPU", "CUDA", "XPU") if hasattr(DispatchKey, name))


_PASSED = [  # of a plain tensor; our ops have no kernels for them, or do nothing there without gradients
    key
    for name, key in DispatchKey.__members__.items()
    if name in ("ADInplaceOrView", "BackendSelect") or name.startswith(("Autocast", "Autograd"))
]
_PLAIN: dict[int, bool] = {}  # by keyset


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
    types = [str(argument.type) for argument in arguments]
    lists = tuple(place for place, kind in enumerate(types) if kind == "List[Tensor]")
    single = tuple(place for place, kind in enumerate(types) if kind in ("Tensor", "Optional[Tensor]"))
    defaults = tuple(argument.default_value if argument.has_default_value() else None for argument in arguments)
    returned = [str(result.type) for result in operator._schema.returns]
    assert "List[Tensor]" not in returned[:-1], operator
    before = len(returned) - 1 if returned[-1:] == ["List[Tensor]"] else None  # results before a list

    direct: dict[int, bool] = {}  # by keyset

    def below(keyset: DispatchKeySet, args: Sequence[Any]) -> Any:
        raw = keyset.raw_repr()
        if raw not in direct:
            direct[raw] = (keyset & _after_autograd_keyset).highestPriorityTypeId() in _BACKENDS
        with _AutoDispatchBelowAutograd():
            return kernel(*args) if direct[raw] else operator.redispatch(keyset & _after_autograd_keyset, *args)

    def forward(ctx, keyset, args, *tensors):  # the same tensors as in ``args``, where a Function looks for them
        result = below(keyset, args)
        if setup_context is not None:
            setup_context(ctx, args, result)
        ctx.counts = [len(args[place]) for place in lists]
        return result if before is None else (*result[:before], *result[before])

    def gradients(ctx, *grads):
        needed = ctx.needs_input_grad
        nested: list[Any] = [False] * len(types)
        for place, flag in zip(single, needed[2:], strict=False):
            nested[place] = flag
        first = 2 + len(single)
        for place, count in zip(lists, ctx.counts, strict=True):
            nested[place] = list(needed[first : first + count])
            first += count
        ctx.needs_input_grad = tuple(nested)
        try:
            found = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed
        found = found if isinstance(found, tuple) else (found,)
        flat = [None, None, *(found[place] for place in single)]
        for place in lists:
            flat += found[place]
        return tuple(flat)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    node = type(f"BackwardOf_{operator._opname}", (torch.autograd.Function,), methods)
    apply = super(torch.autograd.Function, node).apply  # type: ignore[misc]  # without what it does for transforms

    def autograd(keyset: DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            args = (*args, *defaults[len(args) :])  # the dispatcher leaves out what equals a default
            if differentiable is not None:
                with _AutoDispatchBelowAutograd():
                    args = differentiable(*args)
            tensors = [args[place] for place in single]
            for place in lists:
                tensors += args[place]
            result = (node.apply if _are_functorch_transforms_active() else apply)(keyset, args, *tensors)  # type: ignore[attr-defined]
            return result if before is None else (*result[:before], list(result[before:]))
        return below(keyset, args)

    return autograd


def reaches_kernels(*tensors: torch.Tensor) -> bool:
    """Whether an op of ours that is called now with these tensors is nothing but its kernel.

    No gradient, mode, transform, profiler or subclass of tensors has a part in it.
    """
    if torch.is_grad_enabled() or _profiler_enabled() or _len_torch_function_stack():
        return False
    keys = _dispatch_tls_local_include_set()
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return False
        keys = keys | _dispatch_keys(tensor)
    keys = keys - _dispatch_tls_local_exclude_set()
    raw = keys.raw_repr()
    if raw not in _PLAIN:
        for key in _PASSED:
            keys = keys.remove(key)
        _PLAIN[raw] = keys.highestPriorityTypeId() in _BACKENDS
    return _PLAIN[raw]
