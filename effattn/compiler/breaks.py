"""Why Dynamo has no graph of a piece of code: read from the records that it keeps of its compilations."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType

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


class Reasons:
    """Reasons by function, of everything that was compiled so far: what was skipped once is not tried again."""

    def __init__(self) -> None:
        from torch._dynamo import utils

        if (utils._compilation_metrics.maxlen or HELD) < HELD:
            utils.set_compilation_metrics_limit(HELD)
        self._failed: dict[tuple[str, int], tuple[str, str]] = {}
        self._broken: dict[tuple[str, int], set[str]] = defaultdict(set)

    def read(self) -> None:
        """Take in what Dynamo has recorded up to now."""
        from torch._dynamo import utils

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

    def of(self, frames: Iterable[Frame]) -> tuple[str, str]:
        """(reason, hint) for a call that was made eagerly in ``frames``, innermost first."""
        if torch._dynamo.config.disable:
            return "torch.compile is switched off (TORCH_COMPILE_DISABLE or torch._dynamo.config.disable)", ""
        frames = tuple(frames)
        inner = None
        for frame in frames:
            for known in (self._disabled(frame, inner), self._recorded(frame)):
                if known is not None:
                    return known
            inner = frame
        return next((known for frame in frames if (known := _never(frame)) is not None), (UNKNOWN, ""))

    def _disabled(self, frame: Frame, inner: Frame | None) -> tuple[str, str] | None:
        """Of the wrapper that ``torch.compiler.disable`` puts around a function."""
        if inner is None or frame.code.co_name != "_fn" or not frame.file.endswith(EVAL_FRAME):
            return None
        return f"torch.compiler.disable keeps {inner.code.co_qualname} out of every graph", ""

    def _recorded(self, frame: Frame) -> tuple[str, str] | None:
        function = frame.file, frame.code.co_firstlineno
        if function in self._failed:
            return self._failed[function]
        if function not in self._broken:
            return None
        if frame.code in torch._dynamo.convert_frame.output_codes:  # Dynamo's own code, at a call it left to Python
            reasons = sorted(_short(reason) for reason in self._broken[function])
            return (f"a graph break in {frame.code.co_name}: {reasons[0][0]}", reasons[0][1]) if reasons else None
        limit = torch._dynamo.config.recompile_limit
        return (
            f"{frame.code.co_name} was compiled {limit} times, torch._dynamo.config.recompile_limit, and is not again",
            "what differs from call to call is told by TORCH_LOGS=recompiles; a higher limit compiles all of them",
        )


def _never(frame: Frame) -> tuple[str, str] | None:
    """Of code that Dynamo does not look at."""
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
