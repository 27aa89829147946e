"""Every architecture in every setting, some at a time, in processes of their own; what is finished is kept.

python -m tests.zoo --out build/zoo.jsonl
python -m tests.zoo --only llama,bert --settings whole
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

LIMIT = 300.0  # seconds of one architecture in all settings


def main(argv: list[str] | None = None) -> int:
    from building import names
    from rich.progress import track
    from trial import ATTENTIONS, SETTINGS
    from worker import Worker

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/zoo.jsonl"), help="lines of JSON")
    parser.add_argument("--only", help="some architectures, by commas")
    parser.add_argument("--attentions", default=",".join(ATTENTIONS))
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--again", action="store_true", help="also what the file already holds")
    options = parser.parse_args(argv)
    asked = options.only.split(",") if options.only else names()
    if strange := sorted(set(asked) - set(names())):
        parser.error(f"no architecture {', '.join(strange)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if options.out.exists() and not options.again:
        done = {json.loads(line)["name"] for line in options.out.read_text().splitlines()}
    left = [name for name in asked if name not in done]
    attentions, settings = options.attentions.split(","), options.settings.split(",")
    wrong, idle = 0, queue.SimpleQueue[Worker]()
    for _ in range(options.jobs):
        idle.put(Worker(LIMIT))

    def tried(name: str) -> list[dict]:
        worker = idle.get()
        try:
            return worker.ask(name, attentions, settings)
        finally:
            idle.put(worker)

    with options.out.open("a") as file, ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(tried, name) for name in left]
        for job in track(as_completed(jobs), total=len(jobs), description="architectures"):
            for row in job.result():
                wrong += row["verdict"] in ("differs", "error", "unseen")
                print(json.dumps(row), file=file, flush=True)
    while not idle.empty():
        idle.get().stop()
    print(f"{options.out}: {len(left)} architectures tried, {wrong} trials with something wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
