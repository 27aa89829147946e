"""The references of linear attention agree with each other: N x N, token by token, in two parts."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from linear_cases import CASES

from effattn.runtime.reference.linear import quadratic, recurrent

CAUSAL = {name: case for name, case in CASES.items() if case.causal}


def close(actual, expected):
    assert_close(actual, expected, 1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_recurrence_is_the_definition(name):
    case = CAUSAL[name]
    meaning = {name: value for name, value in case.meaning.items() if name != "causal"}
    tensors = case.tensors(torch.float64)
    close(recurrent(*tensors, **meaning), quadratic(*tensors, **meaning))


@pytest.mark.parametrize("name", [name for name, case in CAUSAL.items() if case.length > 1])
def test_a_state_stands_for_all_tokens_before(name):
    case = CAUSAL[name]
    query, key, value, decay, state = case.tensors(torch.float64)
    out, last = quadratic(query, key, value, decay, state, **case.meaning)
    cut = 11
    first = (tensor[:, :, :cut] for tensor in (query, key, value))
    rest = (tensor[:, :, cut:] for tensor in (query, key, value))
    head, middle = quadratic(*first, decay, state, **case.meaning)
    tail, end = quadratic(*rest, decay, middle, **case.meaning)
    close(torch.cat([head, tail], dim=2), out)
    close(end, last)


def test_weights_sum_to_one_and_rows_without_weight_are_zero():
    query, key, value, _, _ = CASES["normalised"].tensors(torch.float64)
    ones = torch.ones_like(value)
    close(quadratic(query, key, ones, normalised=True)[0], ones)
    none = quadratic(torch.zeros_like(query), key, value, normalised=True, eps=1e-6)[0]
    close(none, torch.zeros_like(value))
