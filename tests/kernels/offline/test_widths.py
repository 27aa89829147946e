"""Whole numbers in kernels are exact: what may not fit into 32 bits is computed in 64, and nothing else is.

The interpreter computes in numpy, so what Triton makes of a kernel for a GPU is looked at too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import sympy
import torch
from checking import check
from plans import CAUSAL, Call, Sizes, tensors
from widths import ATOMS, NARROW, SIZES, call_of

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import FloorDiv, Nk, Nq, h, k, load, q, s, scalar
from effattn.ir.fold import Integers, fold
from effattn.ir.plan import Plan
from effattn.ir.refusal import Why
from effattn.lowering.dialects.triton import terms as algebra
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime import launching
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import portable
from effattn.runtime.targets import triton as triton_target

TILES = Tiles(16, 16, 4, 1)


@pytest.mark.parametrize("kind", ["prefill", "decode", "portable"])
@pytest.mark.parametrize("name", ATOMS)
def test_whole_numbers_are_exact(name, kind):
    """Against Python's own integers, which do not wrap around."""
    sizes = SIZES if kind != "decode" else Sizes(2, 2, 1, 2, 40)
    call = call_of(name, sizes)
    assert kind == "decode" or 0.02 < expected_mask(call, sizes).float().mean() < 0.98
    check_exactly(call, sizes, kind)


def check_exactly(call: Call, sizes: Sizes, kind: str) -> None:
    query, key, value = tensors(sizes)
    scores = (query.double() @ key.double().mT * sizes.scale).masked_fill(~expected_mask(call, sizes), -torch.inf)
    out = scores.softmax(-1).nan_to_num(0) @ value.double()
    given = (call.plan, query, key, value, call.captures, call.scalars)
    if kind == "portable":
        found, _ = portable.run(*given)
    else:
        found, _ = triton_target.run(*given, config=TILES, kind=kind, splits=2 if kind == "decode" else None)
    torch.testing.assert_close(found.double(), out, atol=2e-5, rtol=2e-5)


class Exact(Integers):
    """Python's integers, of which an array holds many: they do not wrap around."""

    TABLE: ClassVar = {
        **Integers.TABLE,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.logical_and,
        "or": np.logical_or,
        "not": np.logical_not,
        "where": np.where,
    }


def expected_mask(call: Call, sizes: Sizes) -> torch.Tensor:
    """bool [B, H, Nq, Nk] of a predicate."""
    tables = {
        spec.name: np.array(tensor.tolist(), dtype=object)
        for spec, tensor in zip(call.plan.spec.captures, call.captures, strict=True)
    }
    shape = (sizes.batch, sizes.heads, sizes.q_len, sizes.k_len)
    places = np.indices(shape).astype(object)
    symbols = dict(zip("bhqk", places, strict=True)) | {"Nq": sizes.q_len, "Nk": sizes.k_len}
    symbols |= dict(zip(call.plan.spec.scalars, call.scalars, strict=True))

    def element(name, indices):
        return tables[name][tuple(np.asarray(index, dtype=np.int64) for index in indices)]

    found = fold(call.plan.spec.predicate, Exact(symbols, element))
    return torch.from_numpy(np.broadcast_to(found, shape).astype(bool))


@pytest.mark.parametrize("name", ["product", "flat index of a table", "int32 data times position"])
def test_gradients_use_the_same_mask(name):
    call, (query, key, value) = call_of(name, SIZES), tensors(SIZES)
    out, lse = triton_target.run(call.plan, query, key, value, call.captures, call.scalars, config=TILES)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    given = (grad, None, query, key, value, out, lse, call.captures, call.scalars)
    found = triton_target.run_backward(call.plan, *given, config=TILES)
    q, k, v = (tensor.double().requires_grad_() for tensor in (query, key, value))
    wanted, _ = reference(call.plan, q, k, v, call.captures, call.scalars)
    wanted.backward(grad.double())
    for one, other in zip(found[:3], (q, k, v), strict=True):
        torch.testing.assert_close(one.double(), other.grad, atol=5e-5, rtol=5e-5)


def test_what_triton_compiles():
    """The tile-wide arithmetic of whole numbers, in Triton's own intermediate language, for sm90."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("widths.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    types = json.loads(done.stdout.splitlines()[-1])
    assert [name for name in ATOMS if "i64" not in types[name]] == []
    assert [name for name in NARROW if "i64" in types[f"narrow: {name}"]] == []


def test_scalars_and_lengths_beyond_a_limit_get_another_kernel(monkeypatch):
    """The same plan, first with a small number and then with a large one."""
    past = scalar("past")
    plan = Plan(
        "exact",
        AttentionSpec(
            0.25 * s, sympy.And(CAUSAL, sympy.Le(k * 3, q * 4 + past), past * 2 - 3 * q > 9), scalars=("past",)
        ),
    )
    sizes = Sizes(1, 1, 1, 20, 20)
    for value in (7, 2**31 - 1, 2**31 + 5, 2**40):
        check(Call(plan, scalars=[value]), *tensors(sizes), config=TILES)
    # the same for lengths, with a limit that small ones exceed
    monkeypatch.setattr(launching, "LENGTH", 10)
    triton_target.forget()
    check(Call(plan, scalars=[7]), *tensors(sizes), config=TILES)
    triton_target.forget()


@pytest.mark.parametrize("kind", ["prefill", "decode", "portable"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bounds_of_the_walk_stand_the_largest_numbers(dtype, kind):
    """A key limit that is the largest or least number of its type means every key, or none."""
    last, first = load("last", [0 * h], integer=True), load("first", [0 * h], integer=True)
    name = str(dtype).removeprefix("torch.")
    captures = (CaptureSpec("last", name, 1), CaptureSpec("first", name, 1))
    sizes = Sizes(1, 1, 1, 1 if kind == "decode" else 40, 40)
    limits = torch.iinfo(dtype)
    rules = [
        sympy.And(sympy.Le(k, last), k >= first),
        sympy.And(k > first, k < last),
        sympy.And(sympy.Le(FloorDiv(k, 16), last), sympy.Ge(FloorDiv(k, 8), first)),
        sympy.And(FloorDiv(k, 16) < last, FloorDiv(k, 8) > first),
    ]
    for rule in rules:
        plan = Plan("exact", AttentionSpec(sizes.scale * s, rule, captures=captures))
        for high, low in ((limits.max, limits.min), (limits.max, 1), (1, limits.min)):
            call = Call(plan, [torch.tensor([high], dtype=dtype), torch.tensor([low], dtype=dtype)])
            check_exactly(call, sizes, kind)


def test_a_number_beyond_64_bits_is_no_kernel():
    plan = Plan("exact", AttentionSpec(0.25 * s, k * 2**70 < q))
    refusal = triton_target.why_not(plan.spec, torch.float32, 16, 16)
    assert (refusal.rule, refusal.reason) == (
        Why.EXPRESSION,
        f"no kernel can be written: no kernel computes with {2**70}",
    )


def test_sums_of_lengths_and_indices_stay_narrow():
    """What most masks are made of: bounds of an offset, a window and a distance."""
    values = {name: algebra.Value(name) for name in ("q", "k", "Nq", "Nk")}
    found = fold(q + Nk - Nq - k - 4096, algebra.Source(values, {}, algebra.Lines()))
    assert not found.wide
    assert found.bounds.within(algebra.INT32)
