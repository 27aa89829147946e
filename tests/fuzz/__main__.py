"""Thousands of random attention functions, each compiled and held against itself; what is right is not tried again.

python -m tests.fuzz --cases 2000 --seed 1 --target triton --workers 16 --record tests/fuzz/recorded.json
python -m tests.fuzz --seed 1 --target triton --only 417
python -m tests.fuzz --case "Case(core='flex', mod='causal')"

Kernels are interpreted on the CPU, unless TRITON_INTERPRET=0 and there is a GPU. The portable target runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.case import Case
    from tests.fuzz.record import Row

EVERY = 5.0  # seconds between two lines of progress


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if options.target == "portable" and not options.case:  # no kernels: on the CPU
        os.environ["TRITON_INTERPRET"] = "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    if options.only is not None or options.case:
        return _one(options)
    with tempfile.TemporaryDirectory(prefix="effattn-fuzz-") as cache:
        os.environ.setdefault("EFFATTN_CACHE_DIR", cache)
        return _many(options)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=("portable", "triton"), default="portable")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a case may take")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="give out no more cases after that long")
    parser.add_argument("--only", type=int, help="the case of this number alone, with everything about it")
    parser.add_argument("--case", help="this case alone, as it is printed")
    parser.add_argument("--no-shrink", action="store_true", help="leave failing cases as they are")
    parser.add_argument(
        "--out", type=Path, default=Path("build/fuzz.jsonl"), help="what is finished, kept for the next run"
    )
    parser.add_argument("--record", type=Path, help="where the counts go, as JSON")
    return parser.parse_args(argv)


def _one(options: argparse.Namespace) -> int:
    from tests.fuzz.case import Case
    from tests.fuzz.drawing import numbered
    from tests.fuzz.trial import run

    warnings.simplefilter("ignore")
    case = Case.read(options.case) if options.case else numbered(options.seed, options.only, options.target)
    trial = run(case)
    print(trial.case, trial.verdict, trial.problem, *trial.predicates, *trial.reasons, trial.detail, sep="\n")
    return int(bool(trial.problem))


def _many(options: argparse.Namespace) -> int:
    from tests.fuzz.drawing import numbered
    from tests.fuzz.record import finished, record, write

    cases = {number: numbered(options.seed, number, options.target) for number in range(options.cases)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = finished(options.out, cases, options.seed)
    rows = _tried(options, cases, rows)
    if left := len(cases) - len(rows):
        print(f"{left} of {len(cases)} are left: run it again")
        return 3
    found = [rows[number] for number in cases]
    if options.record is not None:
        write(options.record, options.target, record(found))
    wrong, slow, none = (sum(row.verdict == verdict for row in found) for verdict in ("wrong", "too slow", "no case"))
    counts = f"{wrong} with something wrong, {slow} too slow, {none} that raise by themselves"
    print(f"{len(found)} attention functions on {options.target}, {counts}")
    return int(wrong > 0)


def _tried(options: argparse.Namespace, cases: dict[int, Case], rows: dict[int, Row]) -> dict[int, Row]:
    """All rows: those that are there, and what processes find of the others, written down one by one."""
    from tests.fuzz.jobs import Job
    from tests.fuzz.record import Row
    from tests.fuzz.workers import results

    jobs = deque(Job(options.seed, number, case) for number, case in cases.items() if number not in rows)
    progress = Progress(len(jobs))
    end = progress.start + options.seconds
    with options.out.open("a") as file:
        for result in results(jobs, "tests.fuzz.jobs:do", options.workers, options.limit):
            number, case = result.job.number, result.job.case
            if result.job.problem:
                plainest = ([case] + [value for value in result.values if value is not None])[-1]
                row = replace(rows[number], smallest=str(plainest))
            else:
                row = result.values[0] if result.values else Row.ended(options.seed, number, case, result.ended)
                progress.count(row)
            rows[number] = row
            if row.problem and not result.job.problem and not options.no_shrink:
                jobs.appendleft(replace(result.job, problem=row.problem))
                continue
            if row.problem or row.verdict == "too slow":
                _tell(options, row)
            print(row.line(), file=file, flush=True)
            if time.monotonic() > end:
                jobs.clear()
    return rows


def _tell(options: argparse.Namespace, row: Row) -> None:
    from tests.fuzz.case import Case

    again = f"python -m tests.fuzz --seed {options.seed} --target {options.target} --only {row.number}"
    print(f"{row.number}: {row.problem or row.verdict}\n    {again}\n    {Case(**row.case)}", flush=True)
    if row.smallest:
        print(f'    python -m tests.fuzz --case "{row.smallest}"', flush=True)


class Progress:
    """A line now and then: how many are done, and how long the rest will take."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.wrong, self.slow = total, 0, 0, 0
        self.start = self.told = time.monotonic()

    def count(self, row: Row) -> None:
        self.done += 1
        self.wrong += row.verdict == "wrong"
        self.slow += row.verdict == "too slow"
        now = time.monotonic()
        if now - self.told < EVERY and self.done < self.total:
            return
        self.told, seconds = now, now - self.start
        left = seconds / self.done * (self.total - self.done)
        told = (
            f"{self.done} of {self.total}, {self.wrong} wrong, {self.slow} too slow; {seconds:.0f} s, {left:.0f} s left"
        )
        print(told, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
