"""The table of targets, and the choice among them: the named target, else the device's, else the portable one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from effattn.errors import TargetError
from effattn.ir.attention import AttentionSpec
from effattn.ir.plan import Kernel
from effattn.ir.refusal import Refusal
from effattn.lowering.device import device_type
from effattn.lowering.schedules.exact import Kind, generated_is_faster
from effattn.runtime.launching import architecture
from effattn.runtime.targets import portable, triton
from effattn.runtime.targets.target import Target
from effattn.settings import warn_once

TARGETS: dict[str, Target] = {"triton": triton, "portable": portable}
ANYWHERE = "portable"  # the target that runs every plan on every device

WhyNot = Callable[[Target], Refusal | None]


def named(name: str) -> Target:
    """The target of this name. Raises TargetError if there is none."""
    if name not in TARGETS:
        raise TargetError(f"there is no target {name!r}; there are {', '.join(map(repr, TARGETS))}")
    return TARGETS[name]


def asked_for(wanted: str | None, device: str) -> Target:
    """The target of this name; for None that of the device type. It may not be able to run there."""
    return TARGETS[device_type(device).target] if wanted is None else named(wanted)


def chosen(wanted: str | None, device: str, why_not: WhyNot) -> tuple[Target, Refusal | None]:
    """The target that runs a call, and why it is not the requested one, if so.

    Args:
        wanted: a name in ``TARGETS``; None: that of the device type.
        device: device type, as in ``torch.device(...).type``.
        why_not: why a target does not support the call; None if it does.
    """
    target = asked_for(wanted, device)
    refusal = target.why_not_on(device) or why_not(target)
    return (target, None) if refusal is None else (TARGETS[ANYWHERE], refusal)


def why_not_there(wanted: str | None, device: str) -> Refusal | None:
    """Why a named target cannot run on a device type; None if it can, or if none is named."""
    return None if wanted is None else named(wanted).why_not_on(device)


def serving(wanted: str | None, device: str, why_not: WhyNot) -> Target:
    """The target that runs a call. Warns once if it is not the requested one.

    Raises:
        TargetError: the named target does not exist, or cannot run on this device type.
    """
    target = asked_for(wanted, device)
    refusal = target.why_not_on(device)
    if refusal is not None and wanted is not None:
        raise TargetError(f"attention by target {wanted!r} cannot run: {refusal}")
    if refusal is None:
        refusal = why_not(target)
    if refusal is None:
        return target
    warn_once(f"{refusal.reason}: using the portable target there, which is slower on a GPU")
    return TARGETS[ANYWHERE]


def why_generated(
    kernel: Kernel,
    target: Target,
    device: torch.device,
    spec: AttentionSpec,
    kind: Kind | None,
    dtype: torch.dtype,
    head_dim: int,
    queries: int,
    training: bool = False,
) -> str | None:
    """Why the target's generated kernel computes attention that SDPA's kernels compute too; None if theirs does.

    Args:
        kernel: what a policy asks for.
        kind: which keys are kept; None: that depends on the call.
        queries, training: see :func:`generated_is_faster`.
    """
    if kernel == "sdpa" or not target.alone or target.why_not_on(device.type):
        return None
    if target.why_not(spec, dtype, head_dim, head_dim) is not None:
        return None
    if kernel == "generated":
        return "a generated kernel, as the policy asks"
    where = architecture(device), str(dtype).removeprefix("torch."), head_dim, queries
    faster = kind is not None and not spec.dropout and generated_is_faster(kind, *where, training)
    return "a generated kernel, which measured faster than SDPA's" if faster else None
