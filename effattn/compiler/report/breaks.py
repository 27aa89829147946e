"""Why Dynamo has no graph of a piece of code: read from the records that it keeps of its compilations."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, FrameType

import torch

HELD = 1024  # compilations of which Dynamo keeps its record; 64 by default, few for a model with breaks
UNKNOWN = "Dynamo ran it eagerly and left no reason; TORCH_LOGS=graph_breaks tells more"
EVAL_FRAME = "/_dynamo/eval_frame.py"


@dataclass(frozen=True)
class Frame:
    """A Python frame: where it was, and what it ran."""

    file: str
    line: int
    code: CodeType
    user: bool  # not torch's own
    disables: str = ""  # the function that ``torch.compiler.disable`` runs here, and why, if it was told

    @classmethod
    def of(cls, frame: FrameType, user: bool) -> Frame:
        code = frame.f_code
        return cls(code.co_filename, frame.f_lineno, code, user, _disabled_by(frame))


def _disabled_by(frame: FrameType) -> str:
    """The wrapper that ``torch.compiler.disable`` puts around a function knows its name, and the reason given."""
    if frame.f_code.co_name != "_fn" or not frame.f_code.co_filename.endswith(EVAL_FRAME):
        return ""
    function, context = frame.f_locals.get("fn"), frame.f_locals.get("self")
    name, told = getattr(function, "__qualname__", type(function).__name__), getattr(context, "msg", None)
    return f"{name} out of every graph: {told}" if told else f"{name} out of every graph"


class Reasons:
    """Reasons by function, of everything that was compiled so far: what was skipped once is not tried again."""

    def __init__(self) -> None:
        from torch._dynamo import utils

        if (utils._compilation_metrics.maxlen or HELD) < HELD:
            utils.set_compilation_metrics_limit(HELD)
        self._earlier = utils.get_compilation_metrics()
        self._compiled: Counter[tuple[str, int]] = Counter()  # since then
        self._failed: dict[tuple[str, int], tuple[str, str]] = {}
        self._broken: dict[tuple[str, int], set[str]] = defaultdict(set)

    def read(self) -> None:
        """Take in what Dynamo has recorded up to now."""
        from torch._dynamo import utils

        earlier = {id(record) for record in self._earlier}
        for record in utils.get_compilation_metrics():
            if not record.co_filename or record.co_firstlineno is None:
                continue
            function = record.co_filename, record.co_firstlineno
            if record.fail_reason:
                place = f"{record.fail_user_frame_filename}:{record.fail_user_frame_lineno}"
                reason, hint = _short(record.fail_reason)
                self._failed[function] = f"Dynamo gave up on {record.co_name} at {place}: {reason}", hint
            else:
                self._broken[function] |= record.restart_reasons or set()
                self._compiled[function] += id(record) not in earlier

    def of(self, frames: Iterable[Frame]) -> tuple[str, str]:
        """(reason, hint) for a call that was made eagerly in ``frames``, innermost first."""
        if torch._dynamo.config.disable:
            return "torch.compile is switched off (TORCH_COMPILE_DISABLE or torch._dynamo.config.disable)", ""
        frames = tuple(frames)
        for explains in (_disabled, self._recorded, _never):
            for place in range(len(frames)):
                if (known := explains(frames, place)) is not None:
                    return known
        return UNKNOWN, ""

    def _recorded(self, frames: tuple[Frame, ...], place: int) -> tuple[str, str] | None:
        frame = frames[place]
        function = frame.file, frame.code.co_firstlineno
        if function in self._failed:
            return self._failed[function]
        if _is_compiled(frame):  # at a call that it leaves to Python
            reasons = sorted(_short(reason) for reason in self._broken.get(function, ()))
            return (f"a graph break in {frame.code.co_name}: {reasons[0][0]}", reasons[0][1]) if reasons else None
        limit = torch._dynamo.config.recompile_limit
        if self._compiled[function] < limit:
            return None
        return (
            f"{frame.code.co_name} was compiled {limit} times, torch._dynamo.config.recompile_limit, and is not again",
            "what differs from call to call is told by TORCH_LOGS=recompiles; a higher limit compiles all of them",
        )


def _is_compiled(frame: Frame) -> bool:
    """Whether a frame runs code that Dynamo wrote."""
    return frame.code in torch._dynamo.convert_frame.output_codes


def _disabled(frames: tuple[Frame, ...], place: int) -> tuple[str, str] | None:
    """Of the wrapper that ``torch.compiler.disable`` puts around a function: nothing inside it is looked at."""
    if not frames[place].disables or any(map(_is_compiled, frames[:place])):
        return None
    return f"torch.compiler.disable keeps {frames[place].disables}", ""


def _never(frames: tuple[Frame, ...], place: int) -> tuple[str, str] | None:
    """Of code that Dynamo does not look at."""
    frame = frames[place]
    if frame.user and frame.code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return f"{frame.code.co_name} is a generator or coroutine, and Dynamo compiles none that eager code calls", ""
    if frame.user and torch._dynamo.trace_rules.check(frame.code):
        return f"Dynamo skips all code in {frame.file}", ""
    return None


def _short(message: str) -> tuple[str, str]:
    """(title and explanation, first hint) of one of Dynamo's messages, which are pages."""
    lines = [line.strip() for line in message.splitlines()]
    explanation = next((line.partition(": ")[2] for line in lines if line.startswith("Explanation: ")), "")
    hint = next((line.partition(": ")[2] for line in lines if line.startswith("Hint: ")), "")
    title = lines[0].rstrip(".")
    return f"{title}. {explanation}" if explanation else title, hint
