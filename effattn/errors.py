"""Errors that effattn raises, one class a mistake. Each says what, where and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effattn.ir.refusal import Refusal


class EffattnError(Exception):
    """Base of every error that effattn raises on purpose."""


class PolicyError(EffattnError):
    """A policy file or dict is not valid. Names the file, the line or key, what is allowed and the nearest match."""


class PolicyNotFound(PolicyError):
    """There is no policy of this name, or its file cannot be read."""


class OptionError(EffattnError):
    """``torch.compile(..., options={...})`` holds a name or value that effattn does not know."""


class TargetError(OptionError):
    """Generated kernels were asked for, ``target="triton"``, where none can run."""


class FormRefused(EffattnError):
    """A form was asked for (by ``attention(...)`` or under ``strict``) at a place where it does not apply."""

    refusals: tuple[Refusal, ...] = ()  # each with the rule that fails

    @classmethod
    def because(cls, message: str, *refusals: Refusal) -> FormRefused:
        """The error with the rules that fail."""
        error = cls(f"{message}{'; '.join(map(str, refusals))}")
        error.refusals = refusals
        return error


class PlanError(EffattnError):
    """A plan string is not one that this version of effattn wrote."""


class VerificationError(EffattnError):
    """``options={"verify": True}`` found that a rewritten graph and the original one disagree."""


class EvaluationError(EffattnError):
    """``evaluate`` was asked for what cannot be measured, or its folder holds what is not its own."""


class RewriteError(EffattnError):
    """A pass left the graph in a state that the checks between passes refuse."""


class WeightsError(EffattnError):
    """A file of weights lacks a tensor, or holds one of another shape, dtype or with values that are not finite."""


class DecayChanged(EffattnError):
    """Tables of decay in a model's buffers are no powers of one rate any more, on which a compiled graph relies."""
