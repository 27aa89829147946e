"""Thousands of random attention functions, each compiled and held against itself.

python -m tests.fuzz --cases 2000 --seed 1 --record tests/fuzz/recorded.json
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter


def main(argv: list[str] | None = None) -> int:
    from rich.progress import Progress

    from tests.fuzz.drawing import numbered
    from tests.fuzz.trial import Trial, run

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    trials: list[Trial] = []
    start = time.time()
    with Progress() as progress:
        bar = progress.add_task("cases", total=options.cases)
        for number in range(options.first, options.first + options.cases):
            trial = run(numbered(options.seed, number))
            trials.append(trial)
            progress.advance(bar)
            if trial.problem:
                print(number, trial.problem, "\n   ", trial.case, flush=True)
    print(Counter(trial.verdict for trial in trials), time.time() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
