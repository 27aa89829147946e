"""The errors that effattn raises, one class per kind of mistake. Messages say what, where and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effattn.ir.refusal import Refusal


class EffattnError(Exception):
    """Base of effattn's own errors."""


class PolicyError(EffattnError):
    """A policy file or dict is invalid. Names the file, the line or key, what is allowed and the nearest match."""


class PolicyNotFound(PolicyError):
    """There is no policy with this name, or its file cannot be read."""


class OptionError(EffattnError):
    """``torch.compile(..., options={...})`` has an unknown name or value."""


class TargetError(OptionError):
    """``target="triton"`` was requested where Triton kernels cannot run."""


class FormRefused(EffattnError):
    """A form was requested (by ``attention(...)`` or under ``strict``) where it does not apply."""

    refusals: tuple[Refusal, ...] = ()  # each with the rule that fails

    @classmethod
    def because(cls, message: str, *refusals: Refusal) -> FormRefused:
        """The error with the rules that fail."""
        error = cls(f"{message}{'; '.join(map(str, refusals))}")
        error.refusals = refusals
        return error


class PlanError(EffattnError):
    """A plan string was not written by this version of effattn."""


class VerificationError(EffattnError):
    """``options={"verify": True}``: a rewritten graph and the original one disagree."""


class EvaluationError(EffattnError):
    """An argument of ``evaluate`` is invalid, or its folder holds other files."""


class RewriteError(EffattnError):
    """A pass left the graph in a state that fails the checks between passes."""


class WeightsError(EffattnError):
    """A weights file lacks a tensor, or has one with the wrong shape or dtype, or with infinities or NaN."""


class DecayChanged(EffattnError):
    """Decay tables in a model's buffers are no longer powers of one rate, which a compiled graph relies on."""
