"""An exception at one attention becomes the refusal of that attention; the rest of the graph is not affected."""

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
    """The refusal for an exception raised at an attention."""
    if isinstance(error, Refused):
        return error.refusal
    if isinstance(error, Unreadable):
        return Refusal(Why.READING, str(error))
    if isinstance(error, RecursionError):
        return Refusal(Why.SIZE, "its scores or mask are nested too deeply to be read")
    if isinstance(error, GuardOnDataDependentSymNode):
        question = str(getattr(error, "cond", "")) or str(error).splitlines()[0]
        return Refusal(Why.SIZES, f"a size depends on data, and the rewriting depends on whether {question}")
    what = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {what[0] if what else 'no message'}"
    ours = not isinstance(error, EffattnError) or isinstance(error, RewriteError)
    hint = 'this is a mistake in effattn; options={"strict": True} raises it' if ours else ""
    return Refusal(Why.UNEXPECTED, reason, hint)


@contextmanager
def left_alone(node: fx.Node, missed: list[Missed], strict: bool) -> Iterator[None]:
    """Leave the attention at ``node`` alone if the body raises; the reason is appended to ``missed``.

    Raises:
        OptionError: the user's request cannot be met. With ``strict``, any exception that is not a refusal.
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
