"""How kernels are compared with the definition."""

from __future__ import annotations

from comparing import assert_close

from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import triton as triton_target


def check(call, query, key, value, tolerance=None, **options):
    """Run ``call`` through a generated kernel and compare output and LSE with float64; returns both."""
    out, lse = triton_target.run(call.plan, query, key, value, call.captures, call.scalars, call.numbers, **options)
    wanted, wanted_lse = reference(call.plan, query, key, value, call.captures, call.scalars, call.numbers)
    assert out.shape == wanted.shape
    assert out.dtype == query.dtype
    assert lse.is_contiguous()
    assert_close(out, wanted, tolerance, exact_dtype=False)
    assert_close(lse, wanted_lse, tolerance, exact_dtype=False)
    return out, lse
