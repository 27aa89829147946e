"""Keep what an earlier run measured and a later one had no time for.

    python -m benchmarks.keeping EARLIER.json LATER.json --out benchmarks/results/prefill_llama.json

A benchmark that writes to a file that is there already keeps its cases in this way by itself. A case is kept or
replaced as a whole, so that a ratio never has its two sides from different runs; every row says which run it is of,
and a run has its own date, device, versions and setting.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from benchmarks import ratios

RUN = ("date", "commit", "device", "versions", "seconds", "setting", "notes")  # what is said of each run
LATE = "no time left for "  # begins the note of a variant that was not started


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """A result in the form in which runs stand apart; None where there is no file.

    Raises:
        ValueError: the file is no result of a benchmark; says which file.
    """
    if not path.exists():
        return None
    try:
        return with_runs(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of a benchmark ({error!r}); delete it to start anew") from error


def with_runs(result: dict[str, Any]) -> dict[str, Any]:
    """``result`` with its runs listed; one that was written before runs were is of a single run."""
    if "runs" in result:
        return result
    run = {name: result[name] for name in RUN if name in result}
    rest = {name: value for name, value in result.items() if name not in RUN}
    return {**rest, "runs": [run], "rows": [{**row, "run": 0} for row in result["rows"]]}


def merge(earlier: dict[str, Any] | None, later: dict[str, Any]) -> dict[str, Any]:
    """``later``, and of ``earlier`` the cases that the later run did not measure as completely.

    A problem of another size or setting is another problem: then nothing is kept.
    """
    if earlier is None or not _same_problem(earlier, later):
        return later
    kept = [case for case in _cases(earlier) if len(_of(earlier, case)) > len(_of(later, case))]
    order = [*_cases(later), *(case for case in _cases(earlier) if case not in _cases(later))]
    runs = [*earlier["runs"], *later["runs"]]
    rows: list[dict[str, Any]] = []
    for case in order:
        if case in kept:
            rows += _of(earlier, case)
        else:
            rows += [{**row, "run": row["run"] + len(earlier["runs"])} for row in _of(later, case)]
    runs = [{**run, "notes": _still_true(run.get("notes", ()), rows)} for run in runs]
    used = sorted({row["run"] for row in rows})
    rows = [{**row, "run": used.index(row["run"])} for row in rows]
    bars = _bars(earlier, later)
    return {
        **later,
        "runs": [runs[number] for number in used],
        "rows": rows,
        "ratios": ratios.ratios(rows, later["against"]),
        "bars": ratios.reached(rows, bars),
    }


def _same_problem(earlier: dict[str, Any], later: dict[str, Any]) -> bool:
    settings = [run.get("setting") for run in (*earlier["runs"], *later["runs"])]
    same = all(setting == settings[0] for setting in settings)
    return same and all(earlier[name] == later[name] for name in ("name", "tiny"))


def _cases(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in result["rows"]))


def _of(result: dict[str, Any], case: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["case"] == case]


def _still_true(notes: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Notes without those on variants that another run has measured."""
    measured = {f"{LATE}{row['case']}, {row['variant']}" for row in rows}
    return [note for note in notes if note not in measured]


def _bars(earlier: dict[str, Any], later: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar once; what is asked may have changed since."""
    found: dict[tuple, dict[str, Any]] = {}
    for bar in (*later["bars"], *earlier["bars"]):
        found.setdefault((bar["case"], bar["variant"], tuple(bar["against"]), bar["what"]), bar)
    return list(found.values())


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Write a result beside its place, then rename: a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("earlier", type=pathlib.Path)
    parser.add_argument("later", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args(argv)
    try:
        earlier, later = read(options.earlier), read(options.later)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if later is None:
        print(f"error: there is no {options.later}", file=sys.stderr)
        return 1
    write(options.out, merge(earlier, later))
    return 0


if __name__ == "__main__":
    sys.exit(main())
