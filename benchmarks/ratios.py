"""Ratios and bars from rows as they stand in a file. Both sides of a ratio are of one case, and so of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]


def cost(rows: Rows, case: str, variant: str, what: str = "ms") -> float | None:
    """What one variant costs; None where it failed or was not measured."""
    for row in rows:
        if (row["case"], row["variant"]) == (case, variant):
            return row[what] if what in row else row["more"].get(what)
    return None


def ratio(rows: Rows, case: str, variant: str, against: Sequence[str], what: str = "ms") -> float | None:
    """``variant`` over the cheapest of ``against`` (of none: its cost); None where one side was not measured."""
    over = cost(rows, case, variant, what)
    if not against:
        return over
    under = [found for name in against if (found := cost(rows, case, name, what))]
    return over / min(under) if over is not None and under else None


def ratios(rows: Rows, against: Sequence[str]) -> list[dict[str, Any]]:
    """Time and memory of every variant over each of ``against``."""
    return [
        {
            "case": row["case"],
            "variant": row["variant"],
            "against": name,
            "time": ratio(rows, row["case"], row["variant"], (name,)),
            "memory": ratio(rows, row["case"], row["variant"], (name,), "peak_gib"),
        }
        for row in rows
        for name in against
        if name != row["variant"] and ratio(rows, row["case"], row["variant"], (name,)) is not None
    ]


def reached(rows: Rows, bars: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every bar with the ratio that was reached (None: not measured)."""
    return [{**bar, "reached": ratio(rows, bar["case"], bar["variant"], bar["against"], bar["what"])} for bar in bars]
