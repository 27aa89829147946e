"""How kernels are compared with the definition."""

from __future__ import annotations

import torch

from effattn.runtime import triton_target
from effattn.runtime.reference import reference


def check(call, query, key, value, tolerance=2e-5, **options):
    """Run ``call`` through a generated kernel and compare output and LSE with float64; returns both."""
    out, lse = triton_target.run(call.plan, query, key, value, call.loads, call.scalars, call.numbers, **options)
    wanted, wanted_lse = reference(call.plan, query, key, value, call.loads, call.scalars, call.numbers)
    assert out.shape == wanted.shape
    assert out.dtype == query.dtype
    assert lse.is_contiguous()
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance, equal_nan=True)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=tolerance, rtol=tolerance)
    return out, lse
