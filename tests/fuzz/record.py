"""What a long run leaves behind: counts by every axis, and what was wrong. Small enough to be committed."""

from __future__ import annotations

import json
import platform
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.trial import Trial

VERDICTS = ("found", "refused", "nothing", "wrong")
AXES = (
    "core", "mask", "fill", "score", "scale", "norm", "product", "scores_are", "softmax", "sink", "dropout", "output",
    "group", "order", "rank", "sdpa_mask", "mod", "hostile", "layout", "dtype", "shapes", "grad", "hidden",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One trial as a line of JSON."""

    seed: int
    number: int
    case: dict[str, Any]
    verdict: str
    problem: str = ""
    smallest: str = ""
    reasons: tuple[str, ...] = ()
    kept: bool = False  # found, and left to the author's own code because of gradients
    compared: int = 0
    seconds: float = 0.0

    @staticmethod
    def of(seed: int, number: int, trial: Trial) -> Row:
        kept = any("kept" in form for form in trial.forms)
        return Row(
            seed, number, asdict(trial.case), trial.verdict, trial.problem, "", tuple(trial.reasons), kept,
            trial.compared, round(trial.seconds, 2),
        )  # fmt: skip

    def line(self) -> str:
        return json.dumps(asdict(self))


def finished(path: Path, seed: int) -> dict[int, Row]:
    """Trials of this seed that were right, by number."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {row.number: row for row in rows if row.seed == seed and row.verdict != "wrong"}


def record(rows: list[Row]) -> dict[str, Any]:
    """Counts are [found, refused, nothing, wrong] for every row of every table."""
    axes: dict[str, dict[str, list[int]]] = {axis: defaultdict(lambda: [0] * len(VERDICTS)) for axis in AXES}
    reasons: Counter[str] = Counter()
    for row in rows:
        for axis, value in row.case.items():
            if axis in axes and value != "-":
                axes[axis][str(value)][VERDICTS.index(row.verdict)] += 1
        reasons.update({reason.split(" (fills")[0][:90] for reason in row.reasons})
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
        "seed": rows[0].seed,
        "cases": len(rows),
        "distinct": len({json.dumps(row.case) for row in rows}),
        "seconds": round(sum(row.seconds for row in rows)),
        "verdicts": {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS},
        "masks compared": sum(row.compared for row in rows),
        "found, kept as written": sum(row.kept for row in rows),
        "axes": {axis: dict(sorted(counts.items())) for axis, counts in axes.items()},
        "reasons": dict(reasons.most_common(25)),
        "failures": [
            {"number": row.number, "problem": row.problem, "smallest": row.smallest} for row in rows if row.problem
        ],
    }


def write(path: Path, body: dict[str, Any]) -> None:
    """One line for each axis and reason."""
    long = ("axes", "failures")
    lines = [f' "{name}": {_rows(value) if name in long else json.dumps(value)}' for name, value in body.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _rows(value: Any) -> str:
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items()) + "\n }"
    return "[" + ",".join(f"\n  {json.dumps(row)}" for row in value) + "]"
