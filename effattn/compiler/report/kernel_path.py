"""The file of the kernel that a choice runs on this machine's GPU."""

from __future__ import annotations

import torch

from effattn.passes.choose.choice import Choice
from effattn.passes.match.anchors.linear import LinearMatch
from effattn.runtime.targets.choice import triton_is_importable


def kernel_path(choice: Choice) -> str:
    """Path of the generated source, written now if it was not there; or what runs instead of a kernel."""
    if not triton_is_importable():
        return "portable (Triton is not installed)"
    from effattn.runtime import kernels
    from effattn.runtime.targets.triton.specialise import spec_of

    site, plan = choice.match.site, choice.plan
    assert plan is not None
    spec = spec_of(
        plan.complete,
        getattr(torch, site.dtype),
        site.hints.q_len,
        site.layout.groups,
        int(site.layout.head_dim),
        int(site.layout.value_dim),
        torch.device(site.device),
    )
    return str(kernels.load(spec).path)


def linear_kernel_path(one: LinearMatch) -> str:
    """The same for linear attention."""
    site = one.match.site
    if site.device != "cuda" or not triton_is_importable():
        return "portable (ATen, in chunks)"
    from effattn.runtime.targets.triton import linear as linear_triton

    dtype, sizes = getattr(torch, site.dtype), site.layout
    widths = int(sizes.head_dim), int(sizes.value_dim)
    if linear_triton.unsupported(dtype, *widths) is not None:
        return "portable (ATen, in chunks)"
    kind: linear_triton.LinearKind = "chunks" if one.term.causal else "whole"
    decay = one.term.rate is not None
    spec = linear_triton.specialise(
        kind, dtype, *widths, 1, sizes.groups, decay, False, one.normalised, False, torch.device(site.device)
    )
    return str(linear_triton.load(spec).path)
