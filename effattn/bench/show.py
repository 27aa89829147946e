"""What was measured, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from effattn.bench.run import Bench, Row


def heading(done: Bench) -> str:
    """Device, versions and sizes in a line."""
    about, setting = done.about, done.about["setting"]
    sizes = f"batch {setting['batch']}, heads {setting['heads']}/{setting['kv_heads']}, D {setting['head_dim']}"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['device']}, {setting['dtype']}, {sizes}; {about['date']}; {versions}"


def tables(done: Bench) -> Iterator[Any]:
    """One table for each problem and direction. "x effattn": the time over effattn's."""
    from rich.table import Table

    for problem, direction in dict.fromkeys((row.problem, row.direction) for row in done.rows):
        rows = [row for row in done.rows if (row.problem, row.direction) == (problem, direction) and not row.why_not]
        density = done.about["work"][problem]["density"]
        title = f"{problem}: {direction}, {density:.1%} of all pairs"
        made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        made.add_column("")
        memory = any(row.peak_gib is not None for row in rows)
        for name in ("ms", "x effattn", "TFLOP/s", *(["peak GiB"] if memory else []), "difference"):
            made.add_column(name, justify="right")
        made.add_column("")
        for row in rows:
            made.add_row(*_cells(row, memory))
        yield made


def left_out(done: Bench) -> list[tuple[str, str]]:
    """(peer, why it cannot compute the problem), each once."""
    return list(dict.fromkeys((row.peer, row.why_not) for row in done.rows if row.why_not))


def _cells(row: Row, memory: bool) -> list[str]:
    peak = [_number(row.peak_gib)] if memory else []
    note = row.error or (f"with {row.options}" if row.options else "")
    if row.wrong:
        note = f"another result: up to {_number(row.tolerated)} is rounding"
    return [
        row.peer,
        _number(row.ms),
        _number(row.over_effattn),
        _number(row.tflops),
        *peak,
        "" if row.difference is None else f"{row.difference:.1e}",
        note,
    ]


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
