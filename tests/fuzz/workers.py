"""Processes that do jobs side by side; one that is silent for too long, or dies, is replaced.

Knows nothing of what a job is: a process imports ``function`` by its name and iterates over what it gives for a job.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

READY, VALUE, DONE = "ready", "value", "done"
DONE_WELL, TOO_SLOW = "done", "too slow"
CONTEXT = multiprocessing.get_context("spawn")  # a fork of a process with threads, or with a GPU, may hang


@dataclass
class Result:
    """``ended`` is "done", "too slow", or how the process died; ``values`` is what came before."""

    job: Any
    values: list[Any]
    ended: str


@dataclass
class _Worker:
    function: str
    job: Any = None
    values: list[Any] = field(default_factory=list)
    deadline: float = float("inf")  # none while it starts
    free: bool = False

    def __post_init__(self) -> None:
        self.connection, other = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_work, args=(self.function, other), daemon=True)
        self.process.start()
        other.close()

    def give(self, job: Any, limit: float) -> None:
        self.job, self.values, self.free = job, [], False
        self.deadline = time.monotonic() + limit
        self.connection.send(job)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def results(jobs: deque[Any], function: str, workers: int, limit: float) -> Iterator[Result]:
    """What ``function`` ("module:name", a generator function) gives for every job, as it comes.

    More jobs may be appended meanwhile. ``limit``: seconds that a process may be silent about its job.
    """
    pool = [_Worker(function) for _ in range(min(workers, len(jobs)))]
    try:
        while jobs or any(worker.job is not None for worker in pool):
            for worker in pool:
                if worker.free and jobs:
                    worker.give(jobs.popleft(), limit)
            ready = wait([worker.connection for worker in pool], timeout=0.5)
            for number, worker in enumerate(pool):
                ended = _heard(worker, limit) if worker.connection in ready else ""
                if not ended and time.monotonic() > worker.deadline:
                    ended = TOO_SLOW
                if not ended:
                    continue
                if worker.job is None:
                    raise RuntimeError(f"a process could not start: it {ended}")
                yield Result(worker.job, worker.values, ended)
                if ended == DONE_WELL:
                    worker.job, worker.free, worker.deadline = None, True, float("inf")
                else:
                    worker.end()
                    pool[number] = _Worker(function)
    finally:
        for worker in pool:
            worker.end()


def _heard(worker: _Worker, limit: float) -> str:
    """Takes one message; how the job ended, if it did."""
    try:
        kind, value = worker.connection.recv()
    except EOFError:
        worker.process.join()
        return f"died with {worker.process.exitcode}"
    worker.deadline = time.monotonic() + limit
    if kind == READY:
        worker.free, worker.deadline = True, float("inf")
    elif kind == VALUE:
        worker.values.append(value)
    return DONE_WELL if kind == DONE else ""


def _work(function: str, connection: Connection) -> None:
    module, name = function.split(":")
    do = getattr(importlib.import_module(module), name)
    connection.send((READY, None))
    try:
        while True:
            for value in do(connection.recv()):
                connection.send((VALUE, value))
            connection.send((DONE, None))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
