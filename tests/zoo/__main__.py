"""Every architecture in every setting, some at a time, in processes of their own; what is finished is kept.

python -m tests.zoo --out build/zoo.jsonl
python -m tests.zoo --only llama,bert --settings whole,generate
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import queue
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

sys.path.insert(0, str(pathlib.Path(__file__).parent))

LIMIT = 120.0  # seconds of one architecture for each setting
SAME = ("torch", "transformers")  # trials that other versions of these made are made again


def main(argv: list[str] | None = None) -> int:
    from building import names
    from results import PATH, this_run
    from rich.progress import track
    from settings import SETTINGS
    from trial import ATTENTIONS
    from worker import Worker

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=PATH, help="lines of JSON, added to what is there")
    parser.add_argument("--only", help="some architectures, by commas")
    parser.add_argument("--attentions", default=",".join(ATTENTIONS))
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--again", action="store_true", help="also what the file already holds")
    options = parser.parse_args(argv)
    attentions, settings = options.attentions.split(","), options.settings.split(",")
    asked = options.only.split(",") if options.only else names()
    for what, given, known in (
        ("architecture", asked, names()),
        ("attention", attentions, ATTENTIONS),
        ("setting", settings, SETTINGS),
    ):
        if strange := sorted(set(given) - set(known)):
            parser.error(f"no {what} {', '.join(strange)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    run = this_run()
    done = set() if options.again else _done(options.out, run)
    left = {name: _left(name, attentions, settings, done) for name in asked}
    left = {name: of_one for name, of_one in left.items() if of_one}
    wrong, idle = 0, queue.SimpleQueue[Worker]()
    for _ in range(options.jobs):
        idle.put(Worker(LIMIT))

    def tried(name: str) -> list[dict]:
        worker = idle.get()
        try:
            return worker.ask(name, left[name])
        finally:
            idle.put(worker)

    with options.out.open("a") as file, ThreadPoolExecutor(options.jobs) as pool:
        print(json.dumps({"run": run}), file=file, flush=True)
        jobs = [pool.submit(tried, name) for name in left]
        for job in track(as_completed(jobs), total=len(jobs), description="architectures"):
            for row in job.result():
                wrong += row["verdict"] in ("differs", "error", "unseen")
                print(json.dumps(row), file=file, flush=True)
    while not idle.empty():
        idle.get().stop()
    print(f"{options.out}: {len(left)} architectures tried, {wrong} trials with something wrong")
    return int(wrong > 0)


def _done(path: pathlib.Path, run: dict) -> set[tuple[str, str, str]]:
    """The trials that the file holds from the versions of this run."""
    from results import read

    rows = read(path) if path.exists() else []
    same = [row for row in rows if all(row["run"].get(name) == run.get(name) for name in SAME)]
    return {(row["name"], row["attention"], row["setting"]) for row in same}


def _left(name: str, attentions: list[str], settings: list[str], done: set) -> dict[str, list[str]]:
    """For each attention the settings that are still to be tried."""
    from results import EVERY

    found = {}
    for attention in attentions:
        if (name, attention, EVERY) not in done:
            found[attention] = [one for one in settings if (name, attention, one) not in done]
    return {attention: of_one for attention, of_one in found.items() if of_one}


if __name__ == "__main__":
    sys.exit(main())
