"""The file of the kernel that a choice runs on this machine's GPU."""

from __future__ import annotations

import torch

from effattn.passes.choose import Choice
from effattn.runtime.attend import triton_is_importable


def kernel_path(choice: Choice) -> str:
    """Path of the generated source, written now if it was not there; or what runs instead of a kernel."""
    if not triton_is_importable():
        return "portable (Triton is not installed)"
    from effattn.runtime import kernels, triton_target

    site, plan = choice.match.site, choice.plan
    assert plan is not None
    spec = triton_target.spec_of(
        plan,
        getattr(torch, site.dtype),
        site.hints.q_len,
        site.layout.groups,
        int(site.layout.head_dim),
        int(site.layout.value_dim),
        torch.device(site.device),
    )
    return str(kernels.load(spec).path)
