"""Trials in a process of their own, which may hang, crash or run out of memory; started once for many architectures."""

from __future__ import annotations

import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from typing import Any

HERE = pathlib.Path(__file__).parent
END = "-- end --"


class Worker:
    """Runs ``python worker.py`` and asks it for one architecture at a time."""

    def __init__(self, limit: float):
        """``limit``: seconds that one architecture may take, for each of its settings."""
        self.limit = limit
        self._process: subprocess.Popen | None = None

    def ask(self, name: str, settings: dict[str, list[str]]) -> list[dict[str, Any]]:
        """Trials of one architecture in the settings of each attention, as :meth:`trial.Trial.to_dict` gives them."""
        from results import EVERY
        from trial import Trial

        process, lines = self._running()
        print(json.dumps([name, settings]), file=process.stdin, flush=True)
        rows: list[dict[str, Any]] = []
        limit = self.limit * sum(map(len, settings.values()))
        deadline = time.monotonic() + limit
        ended = f"took more than {limit:g} s"
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = lines.get(timeout=left)
            except queue.Empty:
                break
            if line == END:
                return rows
            if line is None:
                ended = f"the process ended with {process.wait()}"
                break
            if line.startswith('{"name"'):
                rows.append(json.loads(line))
        self.stop()
        tried = {(row["attention"], row["setting"]) for row in rows}
        missing = [(a, s) for a, of_a in settings.items() for s in of_a if not tried & {(a, s), (a, EVERY)}]
        return rows + [Trial(name, attention, setting, error=ended).to_dict() for attention, setting in missing]

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _running(self) -> tuple[subprocess.Popen, queue.Queue]:
        if self._process is None or self._process.poll() is not None:
            quiet = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env={**os.environ, **quiet},
            )  # fmt: skip
            self._lines: queue.Queue = queue.Queue()
            threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        return self._process, self._lines


def _read(process: subprocess.Popen, lines: queue.Queue) -> None:
    for line in process.stdout or ():
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _serve() -> None:
    sys.path.insert(0, str(HERE))
    from trial import trials

    for line in sys.stdin:
        name, settings = json.loads(line)
        for attention, of_one in settings.items():
            for trial in trials(name, attention, of_one):
                print(json.dumps(trial.to_dict()), flush=True)
        print(END, flush=True)


if __name__ == "__main__":
    _serve()
