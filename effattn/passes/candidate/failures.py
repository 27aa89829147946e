"""A failure is one site's, never its graph's: whatever is raised about one attention becomes its refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from effattn.errors import EffattnError, OptionError, RewriteError
from effattn.ir.refusal import Refusal, Why
from effattn.passes.candidate.record import Missed, Refused
from effattn.passes.symbolic.reader import Unreadable


def refusal_of(error: Exception) -> Refusal:
    """Why an attention is left alone over whose treatment ``error`` was raised."""
    if isinstance(error, Refused):
        return error.refusal
    if isinstance(error, Unreadable):
        return Refusal(Why.READING, str(error))
    if isinstance(error, RecursionError):
        return Refusal(Why.SIZE, "its scores or mask are too many operations deep to be read")
    if isinstance(error, GuardOnDataDependentSymNode):
        question = str(getattr(error, "cond", "")) or str(error).splitlines()[0]
        return Refusal(Why.SIZES, f"a size depends on data, and replacing it takes to know whether {question}")
    what = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {what[0] if what else 'no message'}"
    ours = not isinstance(error, EffattnError) or isinstance(error, RewriteError)
    hint = 'this is a mistake in effattn; options={"strict": True} raises it' if ours else ""
    return Refusal(Why.UNEXPECTED, reason, hint)


@contextmanager
def left_alone(node: fx.Node, missed: list[Missed], strict: bool) -> Iterator[None]:
    """What is raised inside leaves the attention at ``node`` alone: the reason goes to ``missed``.

    Raises:
        OptionError: what the user asked for cannot be had. With ``strict`` also all else that is no refusal.
    """
    try:
        yield
    except OptionError:
        raise
    except Exception as error:
        refusal = refusal_of(error)
        if strict and refusal.rule == Why.UNEXPECTED:
            raise
        missed.append(Missed.at(node, refusal))
