"""A sample of the random attention functions; ``make fuzz`` tries thousands."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.fuzz.case import Case
from tests.fuzz.drawing import drawn, numbered
from tests.fuzz.tables.flexible import MODS
from tests.fuzz.tables.masks import MASKS
from tests.fuzz.trial import run

IN_TURN, RANDOM = 44, int(os.environ.get("EFFATTN_CASES", "16"))
SAMPLE = 11  # the seed of the random ones


def in_turn(count: int) -> list[Case]:
    """Cases that take one row after the other from every table, so that few of them use many rows.

    Every third runs on kernels.
    """
    tables: dict[tuple, itertools.cycle] = {}

    def pick(values):
        values = tuple(values)
        return next(tables.setdefault(values, itertools.cycle(values)))

    return [replace(drawn(pick), target=_target(number)) for number in range(count)]


def _target(number: int) -> str:
    return "triton" if number % 3 == 2 else "portable"


@pytest.mark.parametrize("case", in_turn(IN_TURN), ids=str)
def test_rows_in_turn(case):
    check(case)


@pytest.mark.parametrize("number", range(RANDOM))
def test_random(number):
    check(numbered(SAMPLE, number, _target(number)))


def check(case: Case) -> None:
    trial = run(case)
    assert not trial.problem, f"{trial.problem}\n{case}\n{trial.detail}"
    assert not trial.eager, f"the function itself raises {trial.eager}\n{case}"


def test_a_function_that_raises_by_itself_is_no_case(monkeypatch):
    def function(case):
        def raises(given):
            raise RuntimeError("no kernel takes this")

        return raises

    monkeypatch.setattr(Case, "function", function)
    trial = run(Case())
    assert (trial.verdict, trial.problem) == ("no case", "")
    assert trial.reasons == ["eager: RuntimeError: no kernel takes this"]


@pytest.mark.parametrize("number", range(3))
def test_a_case_can_be_typed_in_again(number):
    case = numbered(SAMPLE, number, "triton")
    assert Case.read(str(case)) == case


@pytest.mark.parametrize("queries", [5, 17])
@pytest.mark.parametrize("name", MASKS)
def test_masks_mean_what_their_oracles_say(name, queries):
    """Both sides of the table, without the backend."""
    keys = queries if MASKS[name].square else 17
    case = Case(mask=name, fill="where -inf", queries=queries, keys=keys, batch=3, groups=2)
    given = case.tensors()
    seen = MASKS[name].make(torch.arange(queries)[:, None], torch.arange(keys)[None], given)
    allowed = case.allowed(given, case.sizes)
    if seen is not None:
        assert np.array_equal(seen.expand(allowed.shape).numpy(), allowed)
    if not MASKS[name].rows_may_be_empty:
        assert allowed.any(-1).all()


@pytest.mark.parametrize("name", MODS)
def test_mods_mean_what_their_oracles_say(name):
    case = Case(core="flex", mod=name, batch=3)
    given = case.tensors()
    mod, allowed = MODS[name].mask(given), case.allowed(given, case.sizes)
    if mod is not None:
        assert np.array_equal(mod(*map(torch.from_numpy, np.indices(allowed.shape))).numpy(), allowed)
