"""The prefill kernel on Triton's interpreter against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from plans import CASES, Sizes, tensors

from effattn.lowering.triton.spec import Tiles
from effattn.runtime import triton_target
from effattn.runtime.reference import reference

SMALL = Tiles(16, 16, 4, 1)


def check(call, query, key, value, tolerance=2e-5, **options):
    out, lse = triton_target.run(call.plan, query, key, value, call.loads, call.scalars, call.numbers, **options)
    wanted, wanted_lse = reference(call.plan, query, key, value, call.loads, call.scalars, call.numbers)
    assert out.shape == wanted.shape
    assert out.dtype == query.dtype
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance, equal_nan=True)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=tolerance, rtol=tolerance)
    return out, lse


@pytest.mark.parametrize("name", CASES)
def test_every_plan(name):
    sizes = Sizes()
    check(CASES[name](sizes, torch.device("cpu")), *tensors(sizes), config=SMALL, kind="prefill")
