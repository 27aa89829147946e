"""Random predicates, lengths and tile sizes: whatever tile ranges are made of them, the numbers are right."""

from __future__ import annotations

import sympy
import torch
from checking import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import Call, Sizes, tensors

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import FloorDiv, IsPowerOfTwo, Nk, Nq, b, k, load, q
from effattn.ir.expr import s as raw
from effattn.ir.plan import Plan
from effattn.lowering.kernels.spec import Tiles

LOADS = (CaptureSpec("padding", "bool", 2), CaptureSpec("start", "int64", 0))


@st.composite
def positions(draw):
    return q + draw(st.sampled_from([0, 3, -9, 16, Nk - Nq, load("start", [], integer=True)]))


@st.composite
def bounds(draw):
    position, width = draw(positions()), draw(st.integers(-5, 40))
    block = draw(st.sampled_from([1, 8, 12, 16]))
    far = FloorDiv(position, block) - FloorDiv(k, block)
    return draw(
        st.sampled_from(
            [sympy.Le(k, position), position - k < width, k - position < width, far < 2, k < width, k >= width - 20]
        )
    )


@st.composite
def choices(draw):
    position, block = draw(positions()), draw(st.sampled_from([8, 16, 32]))
    distance = FloorDiv(position, block) - FloorDiv(k, block)
    parts = [
        draw(st.sampled_from([position - k < 14, distance < 2, sympy.And(distance >= 0, distance < 3)])),
        k < draw(st.integers(0, 30)),
        IsPowerOfTwo(distance),
    ]
    return sympy.Or(*draw(st.lists(st.sampled_from(parts), min_size=1, max_size=3, unique=True)))


@st.composite
def predicates(draw):
    padding = sympy.Ne(load("padding", [b, k], integer=True), 0)
    atoms = st.one_of(bounds(), choices(), st.just(padding), st.just(sympy.Not(padding)))
    return sympy.And(*draw(st.lists(atoms, max_size=3)))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    predicate=predicates(),
    q_len=st.integers(1, 50),
    k_len=st.integers(1, 70),
    tiles=st.sampled_from([Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1)]),
    empty_rows=st.sampled_from(["zero", "nan", "mean"]),
    start=st.integers(0, 20),
    decode=st.booleans(),
)
def test_any_predicate(predicate, q_len, k_len, tiles, empty_rows, start, decode):
    if decode:
        q_len = 1
    sizes = Sizes(2, 2, 1, q_len, k_len, 16, 16)
    plan = Plan("exact", AttentionSpec(sizes.scale * raw, predicate, captures=LOADS, empty_rows=empty_rows))
    padding = torch.rand(2, k_len, generator=torch.Generator().manual_seed(k_len)) > 0.3
    call = Call(plan, [padding, torch.tensor(start)])
    options = {"kind": "decode", "splits": 3} if decode else {"kind": "prefill"}
    check(call, *tensors(sizes), config=tiles, **options)
