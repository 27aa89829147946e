"""The targets, and which of them serves a call: the one that is named, or that of its device, or the portable one."""

from __future__ import annotations

from collections.abc import Callable

from effattn.errors import TargetError
from effattn.ir.refusal import Refusal
from effattn.lowering.device import device_type
from effattn.runtime.targets import portable, triton
from effattn.runtime.targets.target import Target
from effattn.settings import warn_once

TARGETS: dict[str, Target] = {"triton": triton, "portable": portable}
ANYWHERE = "portable"  # the target that serves every plan on every device

WhyNot = Callable[[Target], Refusal | None]


def named(name: str) -> Target:
    """Raises TargetError: there is no target of this name."""
    if name not in TARGETS:
        raise TargetError(f"there is no target {name!r}; there are {', '.join(map(repr, TARGETS))}")
    return TARGETS[name]


def asked_for(wanted: str | None, device: str) -> Target:
    """The target with this name, or that of the device type; whether it can run is another question."""
    return TARGETS[device_type(device).target] if wanted is None else named(wanted)


def chosen(wanted: str | None, device: str, why_not: WhyNot) -> tuple[Target, Refusal | None]:
    """The target that serves a call, and why it is not the one that was wanted, if it is not.

    Args:
        wanted: a name in ``TARGETS``, or None: that of the device.
        device: its type, as torch calls it.
        why_not: asks a target for what it does not serve of the call.
    """
    target = asked_for(wanted, device)
    refusal = target.why_not_on(device) or why_not(target)
    return (target, None) if refusal is None else (TARGETS[ANYWHERE], refusal)


def why_not_there(wanted: str | None, device: str) -> Refusal | None:
    """Why a target that somebody names cannot run on a type of device; None: it can, or nobody names one."""
    return None if wanted is None else named(wanted).why_not_on(device)


def serving(wanted: str | None, device: str, why_not: WhyNot) -> Target:
    """:func:`chosen` for a call that is about to run, with a warning where it is not the one that was wanted.

    Raises:
        TargetError: a target is named that cannot run on such a device.
    """
    if (refusal := why_not_there(wanted, device)) is not None:
        raise TargetError(f"attention by target {wanted!r} cannot run: {refusal}")
    target, refusal = chosen(wanted, device, why_not)
    if refusal is not None:
        warn_once(f"{refusal.reason}: using the portable target there, which is slower on a GPU")
    return target
