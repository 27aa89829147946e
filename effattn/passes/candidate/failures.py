"""An exception at one attention becomes the refusal of that attention; the rest of the graph is not affected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass
class left_alone:  # a class, as it is entered for every node, and a generator takes three times as long
    """Leave the attention at ``node`` alone if the body raises; the reason is appended to ``missed``.

    Raises:
        OptionError: the user's request cannot be met. With ``strict``, any exception that is not a refusal.
    """

    node: fx.Node
    missed: list[Missed]
    strict: bool

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception) or isinstance(error, OptionError):
            return False
        refusal = refusal_of(error)
        if self.strict and refusal.rule == Why.UNEXPECTED:
            return False
        self.missed.append(Missed.at(self.node, refusal))
        return True
