"""Every benchmark, one after the other, within a time; one short table last.

    python -m benchmarks.gpu_all --out benchmarks/results --minutes 8
    python -m benchmarks.gpu_all --out benchmarks/results --only prefill_llama,kernels

Each runs in a process of its own and writes after every variant, so what has been measured is kept when the time is up.
Cases that an earlier run measured and this one has no time for stay in the files (``--fresh`` drops them).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import keeping, tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
# name -> share of the time; in this order, and what one does not use, the next ones get
BENCHMARKS = {
    "prefill_llama": 5,
    "kernels": 6,
    "selectors": 4,
    "linear_lightning": 2,
    "decode_static": 3,
    "train_step": 2,
    "compile_time": 2,
    "host": 1,
}
LAST_VARIANT = 60  # seconds that a variant which has been started may still take
TINY_SECONDS = 120


def run_one(name: str, options: argparse.Namespace, seconds: float) -> str:
    """Run one benchmark in its own process; says how it ended."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(options.out.resolve() / f"{name}.json")]
    command += ["--device", options.device, "--seconds", f"{seconds:.0f}"]
    command += ["--tiny", "--repeats", "3"] if options.tiny else []
    command += ["--fresh"] if options.fresh else []
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(timeout=seconds + LAST_VARIANT)
        ended = "done" if code == 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        ended = "stopped: time is up"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started itself
            process.wait()
    return f"{ended}, {time.perf_counter() - start:.0f} s"


def shares(names: list[str], left: float) -> float:
    """Seconds that the first of ``names`` may take of what is left."""
    return left * BENCHMARKS[names[0]] / sum(BENCHMARKS[name] for name in names)


def load(folder: pathlib.Path, names: list[str]) -> list[dict[str, Any]]:
    paths = [folder / f"{name}.json" for name in names]
    return [result for path in paths if (result := keeping.read(path)) is not None]


def summary(results: list[dict[str, Any]], ends: dict[str, str]) -> Table:
    """One line a bar, and what failed or was not reached in time."""
    made = Table(title="needed and reached", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("benchmark", "case", "variant", "needed", "reached", ""):
        made.add_column(heading, justify="right" if heading == "reached" else "left")
    for result in results:
        for line in tables.bars([result])[1]:
            made.add_row(result["name"], *line)
        for row in result["rows"]:
            if row["error"]:
                made.add_row(result["name"], row["case"], row["variant"], row["error"][:60], "", "failed")
    for name, ended in ends.items():
        made.add_row(name, "", "", ended)
    return made


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder of results (default benchmarks/results; tiny ones: build)"
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all of them together (default 8)")
    parser.add_argument("--only", help=f"some of: {','.join(BENCHMARKS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh", action="store_true", help="keep no case of an earlier run")
    parser.add_argument("--tiny", action="store_true", help="see that all of them run (always so without a GPU)")
    options = parser.parse_args(argv)
    options.tiny = options.tiny or options.device == "cpu"
    options.out = options.out or ROOT / ("build/tiny-benchmarks" if options.tiny else "benchmarks/results")
    options.names = options.only.split(",") if options.only else list(BENCHMARKS)
    if strange := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(strange)}; there are {', '.join(BENCHMARKS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, ends = time.perf_counter() + 60 * options.minutes, {}
    for i, name in enumerate(options.names):
        left = deadline - time.perf_counter()
        if left < 0 and not options.tiny:
            ends[name] = "not started: time is up"
            continue
        ends[name] = run_one(name, options, TINY_SECONDS if options.tiny else shares(options.names[i:], left))
    Console(width=150).print(summary(load(options.out, options.names), ends))
    return int(any(not ended.startswith("done") for ended in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
