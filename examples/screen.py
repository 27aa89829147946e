"""What the demonstration shows on a terminal; used by demo.py."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class Screen:
    """Sections, one progress bar over all steps, and a line for every step that is done."""

    def __init__(self, console: Console, steps: int):
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.all = self.progress.add_task("", total=steps)

    def section(self, title: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{title}", align="left")

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        self.progress.update(self.all, description=text)
        start = time.perf_counter()
        yield
        self.progress.advance(self.all)
        self.console.print(f"[green]done[/] {text} [dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)

    def show(self, body: Any) -> None:
        if isinstance(body, str):
            self.console.print("  " + body.replace("\n", "\n  "), highlight=False, soft_wrap=True)
        else:
            self.console.print(Padding(body, (0, 0, 0, 2)), highlight=False)


def table(first: str, *headings: str) -> Table:
    """A table without lines: names to the left, figures to the right."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    made.add_column(first)
    for heading in headings:
        made.add_column(heading, justify="right")
    return made
