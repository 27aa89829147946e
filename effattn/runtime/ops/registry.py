"""Registration of ops in the namespace ``effattn``, once per process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effattn.runtime.ops.autograd import autograd_kernel


@dataclass(frozen=True)
class Op:
    """The definition of one op for torch.library."""

    schema: str  # arguments and results, without the name
    kernel: Callable
    fake: Callable
    backward: Callable
    setup_context: Callable | None = None
    differentiable: Callable[..., tuple] | None = None  # see :func:`autograd_kernel`

    @classmethod
    def of_choices(cls, schema: str, kernel: Callable, fake: Callable) -> Op:
        """An op of query, key, captures, scalars, numbers and plan whose results, block numbers or positions, have no
        gradient.
        """

        def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            ctx.captures = len(inputs[2])
            ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

        def backward(ctx: Any, *grads: Any) -> tuple:
            return None, None, [None] * ctx.captures, None, None, None

        return cls(schema, kernel, fake, backward, setup_context)


def register(ops: Mapping[str, Op]) -> torch.library.Library | None:
    """Define ops by name. Keep the returned library alive; None if this process has already defined them."""
    if hasattr(torch.ops.effattn, next(iter(ops))):
        return None
    library = torch.library.Library("effattn", "FRAGMENT")
    for name, op in ops.items():
        library.define(name + op.schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
        library.impl(name, op.kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"effattn::{name}", op.fake, lib=library)
        overload = getattr(torch.ops.effattn, name).default
        gradient = autograd_kernel(overload, op.kernel, op.backward, op.setup_context, op.differentiable)
        library.impl(name, gradient, "Autograd", with_keyset=True)
    return library
