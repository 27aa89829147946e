"""What the tile ranges of a predicate say is what the predicate says: of random ones, row by row, tile by tile."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn.ir.expr import FloorDiv, IsPowerOfTwo, Modulo, Nk, Nq, Table, Where, b, h, k, load, number, q, scalar
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.runtime.algebra import evaluate
from effattn.runtime.targets.chunks import Walker

BATCH, HEADS = 2, 3
SCALARS = {"past": 5, "number": 2.5}
LOADS = {
    "live": torch.tensor(7),
    "lengths": torch.tensor([11, 23]),
    "per_head": torch.tensor([0, 3, 9]),
    "padding": torch.arange(90).remainder(7).ne(2).view(2, 45),
    "local": torch.tensor([True, False, True]),
    "slopes": torch.tensor([0.25, 1.5, 2.75]),
}
live = load("live", [], integer=True)
lengths = load("lengths", [b], integer=True)
per_head = load("per_head", [h], integer=True)
padding = sympy.Ne(load("padding", [b, k], integer=True), 0)
slopes = load("slopes", [h], integer=False)
local = sympy.Ne(load("local", [h], integer=True), 0)

small = st.integers(-12, 40)
blocks = st.sampled_from([1, 2, 3, 4, 8, 16])
positions = st.sampled_from([q, q + Nk - Nq, q + scalar("past"), q + live, q + lengths - 3, q + 4, 2 * q, q + per_head])


@st.composite
def rows(draw):
    """Something a key may be compared with: most never decrease in q, some do, some are not even whole numbers."""
    position = draw(positions)
    block = draw(blocks)
    return draw(
        st.sampled_from(
            [
                position + draw(small),
                FloorDiv(position, block) * block + draw(small),
                FloorDiv(position, block) + FloorDiv(q, draw(blocks)),
                sympy.Integer(draw(small)),
                lengths,
                per_head + 2,
                h * 5 + q,
                draw(small) - q,
                sympy.Float(draw(st.floats(-10, 30, allow_nan=False))),
                q + sympy.Rational(7, 2),
                q - 4.0,
                q / 2,
                q * slopes,
                q + slopes,
                q + number("number"),
                sympy.Max(q, 9),
                sympy.Max(draw(small), sympy.Min(position, Nk - 8)) - 3,
                sympy.Max(position, lengths) - sympy.Min(q, 5),
                Where(local, position - 4, sympy.Integer(draw(small))),
                Where(local, position, 2 * q) + per_head,
                Where(q < draw(small), q, q + 9),
                FloorDiv(sympy.Min(position, 30), block) * block,
                Table(h, sympy.Integer(4), sympy.Integer(40), sympy.Integer(9)) + position,
                Modulo(q, 7) * 4,
            ]
        )
    )


@st.composite
def comparisons(draw):
    key = draw(st.sampled_from([k, k, k, FloorDiv(k, draw(blocks)), 2 * k, -k, FloorDiv(k + 3, 4), k - FloorDiv(k, 5)]))
    row = draw(rows())
    relation = draw(st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt]))
    if draw(st.integers(0, 4)) == 0:
        return relation(sympy.Abs(row - key), draw(small))
    if draw(st.integers(0, 4)) == 0:
        return sympy.Or(draw(st.sampled_from([local, sympy.Ne(per_head, 3), slopes > 1])), relation(key, row))
    return relation(key, row) if draw(st.booleans()) else relation(row - key, draw(small))


@st.composite
def listed(draw):
    block = draw(blocks)
    position = draw(positions)
    return IsPowerOfTwo(FloorDiv(position, block) - FloorDiv(k, draw(st.sampled_from([block, block, 8]))))


atoms = st.one_of(comparisons(), comparisons(), listed(), st.just(padding), st.just(sympy.Eq(Modulo(k - q, 3), 0)))


@st.composite
def predicates(draw):
    """Bands, choices of the kind that forms make, and anything else."""
    parts = draw(st.lists(comparisons(), max_size=3))
    for _ in range(draw(st.integers(0, 2))):
        band = sympy.And(*draw(st.lists(comparisons(), min_size=1, max_size=2)))
        parts.append(sympy.Or(band, *draw(st.lists(st.one_of(atoms, listed()), max_size=3))))
    parts += draw(st.lists(atoms, max_size=1))
    return sympy.And(*parts)


def grid(term, q_len: int, k_len: int) -> torch.Tensor:
    """A boolean term over the whole square: [B, H, Nq, Nk]."""
    symbols = {
        **SCALARS,
        "Nq": q_len,
        "Nk": k_len,
        "b": torch.arange(BATCH).view(-1, 1, 1, 1),
        "h": torch.arange(HEADS).view(-1, 1, 1),
        "q": torch.arange(q_len).view(-1, 1),
        "k": torch.arange(k_len),
    }
    return torch.as_tensor(evaluate(term, symbols, LOADS, torch.float64, "cpu")).expand(BATCH, HEADS, q_len, k_len)


lengths_of_calls = st.tuples(st.integers(1, 40), st.integers(1, 45))


@settings(max_examples=100, deadline=None)
@given(predicates(), lengths_of_calls)
def test_structure_and_residual_are_the_predicate(predicate, sizes):
    parts = tile_ranges(predicate)
    together = grid(parts.structural, *sizes) & grid(parts.residual, *sizes)
    assert torch.equal(together, grid(predicate, *sizes)), parts


@settings(max_examples=100, deadline=None)
@given(predicates(), lengths_of_calls)
def test_the_bounds_are_the_structure(predicate, sizes):
    """The record read as its docstring says, element by element."""
    parts = tile_ranges(predicate)

    def within(lower, upper):
        conditions = [*(sympy.Ge(k, bound) for bound in lower), *(sympy.Lt(k, bound) for bound in upper)]
        return grid(sympy.And(*conditions), *sizes)

    kept = within(parts.lower, parts.upper)
    if parts.choice:
        chosen = torch.zeros_like(kept)
        if parts.near_lower is not None:
            chosen = chosen | within(parts.near_lower, parts.near_upper)
        if parts.prefix is not None:
            chosen = chosen | within((), (parts.prefix,))
        if parts.powers is not None:
            block = parts.powers.block
            chosen = chosen | grid(IsPowerOfTwo(FloorDiv(parts.powers.position, block) - FloorDiv(k, block)), *sizes)
        kept = kept & chosen
    assert torch.equal(kept, grid(parts.structural, *sizes)), parts


@settings(max_examples=100, deadline=None)
@given(predicates(), st.integers(2, 40))
def test_bounds_are_whole_and_never_decrease(predicate, q_len):
    parts = tile_ranges(predicate)
    bounds = [*parts.lower, *parts.upper, *(parts.near_lower or ()), *parts.near_upper]
    bounds += [parts.prefix] if parts.prefix is not None else []
    bounds += [parts.powers.position] if parts.powers is not None else []
    for bound in bounds:
        symbols = {
            **SCALARS,
            "Nq": q_len,
            "Nk": 45,
            "b": torch.arange(BATCH).view(-1, 1, 1),
            "h": torch.arange(HEADS).view(-1, 1),
            "q": torch.arange(q_len),
        }
        values = torch.as_tensor(evaluate(bound, symbols, LOADS, torch.float64, "cpu"))
        assert not values.is_floating_point(), bound
        if values.ndim and values.shape[-1] > 1:
            assert (values.diff(dim=-1) >= 0).all(), bound


@settings(max_examples=120, deadline=None)
@given(predicates(), lengths_of_calls, st.sampled_from([1, 4, 7, 16, 64]))
def test_chunks_visit_every_kept_key_and_full_ones_are_full(predicate, sizes, height):
    q_len, k_len = sizes
    walker = Walker(predicate, (BATCH, HEADS, q_len, k_len), SCALARS, LOADS)
    kept, structural = grid(predicate, *sizes), grid(walker.tile_ranges.structural, *sizes)
    row = 0
    for chunk in walker.chunks(height):
        assert chunk.start == row
        assert chunk.start < chunk.stop <= q_len
        row = chunk.stop
        visited = torch.zeros(k_len, dtype=torch.bool)
        last = 0
        for run in chunk.runs:
            assert last <= run.start < run.stop <= k_len
            last = run.stop
            visited[run.start : run.stop] = True
            if run.full:
                assert structural[:, :, chunk.start : chunk.stop, run.start : run.stop].all(), run
        assert not kept[:, :, chunk.start : chunk.stop][..., ~visited].any(), (chunk, walker.tile_ranges)
    assert row == q_len


@pytest.mark.parametrize(
    ("predicate", "bounds"),
    [
        (k <= q, 1),
        ((k <= q) & (q - k < 9), 2),
        ((k <= q) & (q - k < 9.0), 2),
        ((k <= q + Nk - Nq) & padding, 1),
        (FloorDiv(k, 16) >= FloorDiv(q, 16), 1),
        (k < lengths, 1),
        (k <= q + live, 1),
        (k >= 1.5, 1),
        (k < q + 3.75, 1),
        (sympy.Abs(sympy.Max(8, sympy.Min(q, Nk - 8)) - k) < 8, 2),
        (sympy.Abs(q - k) < Table(h, *map(sympy.Integer, (4, 40, 9))), 2),
        ((k <= q) & (local | (q - k < 9)), 2),
        ((k <= q) & (local | ((q - k < 9) & (k < 40))), 3),
        (k < Where(local, q + 4, lengths), 1),
    ],
    ids=str,
)
def test_what_must_be_bounded_is(predicate, bounds):
    parts = tile_ranges(predicate)
    assert len(parts.lower) + len(parts.upper) == bounds
    assert parts.residual in (sympy.true, padding)


@pytest.mark.parametrize("tiny", [2.5e-146, 1e-9, -1e-12, 7 + 1e-9])
@pytest.mark.parametrize("relation", [sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt])
def test_a_fraction_lost_in_float32_gives_no_bound(relation, tiny):
    """In float32 ``0 >= 1e-146`` holds and ``k >= 1`` would not."""
    parts = tile_ranges(relation(k, tiny))
    assert not parts.lower
    assert not parts.upper
    assert torch.equal(grid(parts.residual, 9, 12), grid(relation(k, tiny), 9, 12))


@pytest.mark.parametrize("sinks", [0, 5])
def test_what_forms_keep_is_a_choice(sinks):
    distance = FloorDiv(q, 16) - FloorDiv(k, 16)
    kept = [distance < 2, IsPowerOfTwo(distance), *([k < sinks] if sinks else [])]
    parts = tile_ranges((k <= q) & sympy.Or(*kept))
    assert parts.choice
    assert parts.residual == sympy.true
    assert parts.powers is not None
    assert parts.powers.block == 16
    assert parts.prefix == (sinks or None)
