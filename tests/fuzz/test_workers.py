"""Processes that hang or die are replaced. Imports little: every process imports this file."""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path

import pytest

from tests.fuzz.workers import results

HERE = "tests.fuzz.test_workers"
FOREVER = 1000


@pytest.fixture(autouse=True)
def found_by_other_processes(monkeypatch):
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


def squared(number):
    yield number
    yield number**2


def hangs(number):
    yield number
    time.sleep(FOREVER)


def dies(number):
    yield number
    os._exit(7)


def test_every_job_is_done_by_some_process():
    jobs, seen = deque(range(5)), {}
    for result in results(jobs, f"{HERE}:squared", 2, FOREVER):
        seen[result.job] = result.values
        if result.job == 3:
            jobs.append(10)
        assert result.ended == "done"
    assert seen == {number: [number, number**2] for number in (0, 1, 2, 3, 4, 10)}


def test_what_hangs_is_ended_and_does_not_stop_the_rest():
    done = list(results(deque([1, 2]), f"{HERE}:hangs", 1, 0.2))
    assert [(result.job, result.ended) for result in done] == [(1, "too slow"), (2, "too slow")]


def test_a_process_that_dies_says_how():
    [result] = results(deque([4]), f"{HERE}:dies", 1, FOREVER)
    assert (result.values, result.ended) == ([4], "died with 7")
