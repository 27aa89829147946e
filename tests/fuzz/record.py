"""What a long run leaves behind: for each target counts by every axis, and what was wrong. Small, to be committed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.case import Case
from tests.fuzz.trial import Trial
from tests.fuzz.where import device_name
from tests.fuzz.workers import TOO_SLOW

VERDICTS = ("found", "refused", "nothing", "wrong", "too slow", "no case")
AXES = (
    "core", "mask", "fill", "score", "scale", "norm", "product", "scores_are", "softmax", "sink", "dropout", "output",
    "group", "order", "rank", "sdpa_mask", "mod", "blocks", "hostile", "layout", "dtype", "shapes", "batches",
    "threads", "grad", "hidden",
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
    compared: int = 0
    kernels: int = 0
    seconds: float = 0.0

    @property
    def target(self) -> str:
        return self.case["target"]

    @staticmethod
    def ended(seed: int, number: int, case: Case, how: str) -> Row:
        """Of a case whose process was ended, or died."""
        verdict = TOO_SLOW if how == TOO_SLOW else "wrong"
        return Row(seed, number, asdict(case), verdict, "" if how == TOO_SLOW else f"the process {how}")

    @staticmethod
    def of(seed: int, number: int, trial: Trial) -> Row:
        return Row(
            seed, number, asdict(trial.case), trial.verdict, trial.problem, "", tuple(trial.reasons), trial.compared,
            trial.kernels, round(trial.seconds, 2),
        )  # fmt: skip

    def line(self) -> str:
        return json.dumps(asdict(self))


def finished(path: Path, cases: dict[int, Case], seed: int) -> dict[int, Row]:
    """Trials of these very cases that were right, by number."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = Row(**json.loads(line))
        same = row.seed == seed and row.number in cases and row.case == asdict(cases[row.number])
        if same and row.verdict not in ("wrong", TOO_SLOW):
            rows[row.number] = row
    return rows


def record(rows: list[Row]) -> dict[str, Any]:
    """Counts are [found, refused, nothing to find, wrong, too slow, no case] for every row of every table."""
    axes: dict[str, dict[str, list[int]]] = {axis: defaultdict(lambda: [0] * len(VERDICTS)) for axis in AXES}
    reasons: Counter[str] = Counter()
    for row in rows:
        for axis, value in row.case.items():
            if axis in axes and value != "-":
                axes[axis][str(value)][VERDICTS.index(row.verdict)] += 1
        reasons.update({reason.split(" (fills")[0][:90] for reason in row.reasons})
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {**versions(), "machine": device_name(rows[0].target)},
        "seed": rows[0].seed,
        "cases": len(rows),
        "distinct": len({json.dumps(row.case) for row in rows}),
        "seconds": round(sum(row.seconds for row in rows)),
        "verdicts": {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS},
        "masks compared": sum(row.compared for row in rows),
        "calls of kernels": sum(row.kernels for row in rows),
        "axes": {axis: dict(sorted(counts.items())) for axis, counts in axes.items()},
        "reasons": dict(reasons.most_common(25)),
        "failures": [
            {"number": row.number, "problem": row.problem, "smallest": row.smallest} for row in rows if row.problem
        ],
    }


def versions() -> dict[str, str]:
    """What it was made with; no Triton where there is none."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = importlib.metadata.version("triton")
    return found


def read(path: Path) -> dict[str, Any]:
    """What is recorded, by target."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, target: str, body: dict[str, Any]) -> None:
    """Puts a target's record among the others: one line for each axis, reason and failure."""
    records = read(path) | {target: body}
    whole = ",\n".join(f'"{name}": {_record(records[name])}' for name in sorted(records))
    path.write_text("{\n" + whole + "\n}\n")


def _record(body: dict[str, Any]) -> str:
    long = ("axes", "failures")
    lines = [f' "{name}": {_rows(value) if name in long else json.dumps(value)}' for name, value in body.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def _rows(value: Any) -> str:
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items()) + "\n }"
    return "[" + ",".join(f"\n  {json.dumps(row)}" for row in value) + "]"
