"""What the zoo found, as lines of JSON that runs of several days append to.

A line ``{"run": {...}}`` says with which versions and when the trials after it were made; every other line is a trial.

python -m tests.zoo.results tests/zoo/results.jsonl another.jsonl --out tests/zoo/results.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
from typing import Any

HERE = pathlib.Path(__file__).parent
PATH = HERE / "results.jsonl"
EVERY = "all"  # the setting of a trial that says why an architecture could not be built

Row = dict[str, Any]


def this_run() -> Row:
    """Date, versions and commit of the run that begins now."""
    from effattn.compiler.report.model import versions

    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=HERE, capture_output=True, text=True).stdout.strip()
    date = datetime.datetime.now().isoformat(sep=" ", timespec="minutes")
    return {"date": date, **versions(), "commit": commit or "unknown"}


def read(*paths: pathlib.Path) -> list[Row]:
    """The trials in some files, each with its ``run``; of one that was made several times, the last.

    Trials of an architecture and a reason why it could not be built exclude each other: the later one stays.
    """
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for path in paths:
        run: Row = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "run" in row:
                run = row["run"]
                continue
            of_one = found.setdefault((row["name"], row["attention"]), {})
            if row["setting"] == EVERY or EVERY in of_one:
                of_one.clear()
            of_one[row["setting"]] = {**row, "run": run}
    rows = [row for of_one in found.values() for row in of_one.values()]
    return sorted(rows, key=lambda row: (row["name"], row["attention"], row["setting"]))


def write(path: pathlib.Path, rows: list[Row]) -> None:
    """Trials in the order of their runs, those of one run in alphabetical order."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(json.dumps(row["run"]), []).append(row)
    with path.open("w", encoding="utf-8") as file:
        for run, of_run in sorted(runs.items()):
            print(f'{{"run": {run}}}', file=file)
            for row in of_run:
                print(json.dumps({key: value for key, value in row.items() if key != "run"}), file=file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Join files of results, without trials that were made again later.")
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="the oldest first")
    parser.add_argument("--out", type=pathlib.Path, default=PATH)
    options = parser.parse_args(argv)
    rows = read(*options.results)
    write(options.out, rows)
    print(f"{options.out}: {len(rows)} trials")
    return 0


if __name__ == "__main__":
    sys.exit(main())
