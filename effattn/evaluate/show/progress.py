"""What is told while an evaluation runs: to nobody, or to a person at a terminal or reading a log."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Silent:
    """Tells nothing; the interface of all others."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def say(self, text: str) -> None:
        """One line."""

    def begin(self, seconds: float) -> None:
        """All work together will take about this long."""

    def work(self, text: str) -> None:
        """What is being done now."""

    def done(self, seconds: float) -> None:
        """Work that was estimated to take this long is done."""


class Shown(Silent):
    """A progress bar and lines on a console (of rich); only the lines where it is no terminal."""

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
    """``90 s``, ``12 min``, ``3.5 h``: for estimates."""
    if seconds < 100:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
