"""What a process of the long run does: try a case, or make a failing one plain."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.fuzz.case import Case
from tests.fuzz.record import Row
from tests.fuzz.shrinking import simpler
from tests.fuzz.trial import run
from tests.fuzz.where import DEVICE


@dataclass(frozen=True)
class Job:
    """``problem``: what is wrong with it, where it is to be made plain."""

    seed: int
    number: int
    case: Case
    problem: str = ""


def do(job: Job) -> Iterator[Any]:
    """A :class:`Row`, or the same case plainer and plainer (None: still trying)."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if job.problem:
        yield from simpler(job.case, job.problem)
        return
    trial = run(job.case)
    yield Row.of(job.seed, job.number, trial)
    if trial.problem and DEVICE == "cuda":
        os._exit(0)  # after some errors nothing on the GPU works in this process
