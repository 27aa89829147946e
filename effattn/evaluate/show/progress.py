"""Progress of an evaluation: silent, or on a terminal or in a log."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Silent:
    """Shows nothing; the interface of the others."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def say(self, text: str) -> None:
        """Print a line."""

    def begin(self, seconds: float) -> None:
        """Start the bar; ``seconds`` is the estimate of the total."""

    def work(self, text: str) -> None:
        """Set the current piece of work."""

    def done(self, seconds: float) -> None:
        """Advance by the estimate of a finished piece."""


class Shown(Silent):
    """A progress bar and lines on a rich console; only lines if it is not a terminal."""

    def __init__(self, console: Any = None):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self.console = console or Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        more = (TimeElapsedColumn(), TextColumn("left"), Remaining())
        self.progress = Progress(*columns, *more, console=self.console, transient=True)
        self.task = self.progress.add_task("", total=None)
        self.last = ""

    def __enter__(self) -> Shown:
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, seconds: float) -> None:
        self.progress.update(self.task, total=max(seconds, 1e-6))

    def work(self, text: str) -> None:
        self.progress.update(self.task, description=text)
        if not self.console.is_terminal and text != self.last:
            self.say(text)
        self.last = text

    def done(self, seconds: float) -> None:
        self.progress.advance(self.task, seconds)


def duration(seconds: float) -> str:
    """A rounded duration: ``90 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
