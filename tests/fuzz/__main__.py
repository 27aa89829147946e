"""Thousands of random attention functions, each compiled and held against itself; what is right is not tried again.

python -m tests.fuzz --cases 2000 --seed 1 --record tests/fuzz/recorded.json
python -m tests.fuzz --seed 1 --only 417
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    from rich.progress import Progress

    from tests.fuzz.drawing import numbered
    from tests.fuzz.record import Row, finished, record, write
    from tests.fuzz.shrinking import smallest
    from tests.fuzz.trial import run

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the case of this number alone, with everything about it")
    parser.add_argument(
        "--out", type=Path, default=Path("build/fuzz.jsonl"), help="what is finished, kept for the next run"
    )
    parser.add_argument("--record", type=Path, help="where the counts go, as JSON")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    if options.only is not None:
        trial = run(numbered(options.seed, options.only))
        print(trial.case, trial.verdict, trial.problem, *trial.predicates, *trial.reasons, trial.detail, sep="\n")
        return int(bool(trial.problem))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = finished(options.out, options.seed)
    left = [number for number in range(options.cases) if number not in rows]
    with options.out.open("a") as file, Progress() as progress:
        bar = progress.add_task("attention functions", total=len(left))
        for number in left:
            case = numbered(options.seed, number)
            row = Row.of(options.seed, number, run(case))
            if row.problem:
                row = replace(row, smallest=str(smallest(case, row.problem)))
                told = f"{number}: {row.problem}\n    {case}\n    {row.smallest}"
                progress.console.print(told, markup=False, soft_wrap=True)
            rows[number] = row
            print(row.line(), file=file, flush=True)
            progress.update(bar, advance=1)
    found = [rows[number] for number in range(options.cases)]
    if options.record is not None:
        write(options.record, record(found))
    wrong = sum(row.verdict == "wrong" for row in found)
    print(f"{len(found)} attention functions, {wrong} with something wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
