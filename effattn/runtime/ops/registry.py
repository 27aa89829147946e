"""Registration of ops in the namespace ``effattn``, once per process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
