"""What a block map says of a pair of blocks holds for all of its tokens, whatever the predicate."""

from __future__ import annotations

import pytest
import sympy
import torch
from block_rules import BATCH, HEADS, LONGEST, dense, given_to, of, of_blocks, rules, spec_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effattn.ir.expr import FloorDiv, IsPowerOfTwo, Modulo, Nk, Nq, Table, b, h, k, q, scalar
from effattn.lowering.iteration.block_rule import undecided
from effattn.runtime.selection import block_map, triton_block_map
from effattn.runtime.selection.block_map import Wanted

CPU = torch.device("cpu")
CAUSAL = k <= q
SAME = sympy.Eq(of("document", b, q), of("document", b, k))
PADDING = sympy.Ne(of("padding", b, k), 0)

sizes_of_calls = st.tuples(st.integers(1, LONGEST), st.integers(1, LONGEST))
sizes_of_blocks = st.sampled_from([(8, 8), (16, 8), (12, 16), (32, 16)])


def listed(module, rule, sizes, blocks, transposed=False):
    """Pairs of blocks that are visited, and those that are not tested: bool [B, H, M, N]."""
    spec, sides = spec_of(rule), blocks[::-1] if transposed else blocks
    found = module.block_map(Wanted(spec, (BATCH, HEADS, *sizes), *given_to(spec), *sides, CPU, transposed))
    assert (found.block, found.unit) == sides
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in found.tensors())
    place, indices = torch.arange(found.kv_indices.shape[3]), found.kv_indices.long()
    taken, tested = place < found.kv_num_blocks[..., None], place < found.partial[..., None]
    # in order, partial ones first
    follows = taken[..., 1:] & (tested[..., 1:] == tested[..., :-1])
    assert (indices.diff(dim=-1)[follows] > 0).all()
    assert (found.partial <= found.kv_num_blocks).all()
    some, every = (
        torch.zeros(indices.shape, dtype=torch.int64).scatter_add(3, indices.where(taken, 0), what.long())
        for what in (taken, taken & ~tested)
    )
    assert some.max() <= 1
    some, every = some.bool(), every.bool()
    both = (some.mT, every.mT) if transposed else (some, every)
    return tuple(each.expand(BATCH, HEADS, -1, -1) for each in both)


def ends_early(sizes, blocks, transposed) -> torch.Tensor:
    """Which pairs have a last block of keys (transposed: of queries) that ends early, and is tested."""
    side = 0 if transposed else 1
    whole = torch.arange(-(-sizes[side] // blocks[side])) < sizes[side] // blocks[side]
    return ~(whole[:, None] if transposed else whole)


@pytest.mark.parametrize("module", [block_map, triton_block_map])
def test_any_rule(module):
    many = 200 if module is block_map else 40

    @settings(max_examples=many, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(rules(), sizes_of_calls, sizes_of_blocks, st.booleans())
    def test(rule, sizes, blocks, transposed):
        some, every = listed(module, rule, sizes, blocks, transposed)
        kept, whole = of_blocks(dense(rule, *sizes), *blocks)
        assert not (kept & ~some).any()
        assert not (every & ~(whole & ~ends_early(sizes, blocks, transposed))).any()

    test()


POSITION = q + Nk - Nq
# rules of which ranges say all there is to know
EXACT = {
    "causal": CAUSAL,
    "window": sympy.And(CAUSAL, q - k < 20),
    "window from the end": sympy.And(k <= POSITION, POSITION - k < 20),
    "documents": SAME,
    "documents, causal": sympy.And(CAUSAL, SAME),
    "documents by an index": sympy.Eq(of("document", b, q - q + 3), of("document", b, k)),
    "shifted documents": sympy.Eq(of("document", b, Modulo(q + scalar("past"), LONGEST)), of("document", b, k)),
    "padding": sympy.And(CAUSAL, PADDING),
    "padding of both": sympy.And(PADDING, sympy.Ne(of("padding", b, q), 0)),
    "lengths": k < of("lengths", b),
    "window of each head": sympy.And(CAUSAL, q - k <= of("per_head", h)),
    "window of each head, constant": sympy.And(CAUSAL, q - k < Table(h, *map(sympy.Integer, (8, 50, 96)))),
    "clamped window": sympy.Abs(sympy.Max(8, sympy.Min(q, Nk - 8)) - k) < 8,
    "blocks": sympy.Ne(of("blocks", h, FloorDiv(q, 8), FloorDiv(k, 8)), 0),
    "opaque": sympy.Ne(of("pairs", b, sympy.Integer(0), q, k), 0),
    "chunks": sympy.And(CAUSAL, sympy.Eq(FloorDiv(q, 32), FloorDiv(k, 32))),
    "levels": of("levels", sympy.Integer(0), h, q, k) > 0.5,
    "every eighth key": sympy.And(CAUSAL, sympy.Or(q - k < 8, sympy.Eq(Modulo(k, 8), 0))),
}


@pytest.mark.parametrize("module", [block_map, triton_block_map])
@pytest.mark.parametrize("name", EXACT)
def test_nothing_is_visited_or_tested_in_vain(name, module):
    sizes, blocks = (88, 96), (16, 8)
    some, every = listed(module, EXACT[name], sizes, blocks)
    kept, whole = of_blocks(dense(EXACT[name], *sizes), *blocks)
    assert torch.equal(some, kept)
    assert torch.equal(every, whole)


def test_lists_are_shared_where_the_rule_is():
    for rule, shape in ((CAUSAL, (1, 1)), (SAME, (BATCH, 1)), (q - k < of("per_head", h), (1, HEADS))):
        spec = spec_of(rule)
        for module in (block_map, triton_block_map):
            found = module.block_map(Wanted(spec, (BATCH, HEADS, 40, 40), *given_to(spec), 16, 16, CPU))
            assert found.kv_indices.shape == (*shape, 3, 3)
            assert found.kv_num_blocks.shape == found.partial.shape == (*shape, 3)


BY_DISTANCE = {
    "band": sympy.Ne(of("band", q - k + LONGEST), 0),
    "steps": of("steps", h, sympy.Abs(q - k)) < 2,
    "slopes": of("slopes", q - k + LONGEST) > 0.5,
}


@pytest.mark.parametrize("module", [block_map, triton_block_map])
@pytest.mark.parametrize("name", BY_DISTANCE)
def test_tables_by_distance(name, module):
    """Of many elements the least and the greatest are found in chunks, so that only a few pairs are tested in vain."""
    sizes, blocks = (LONGEST, LONGEST), (16, 16)
    some, every = listed(module, BY_DISTANCE[name], sizes, blocks)
    kept, whole = of_blocks(dense(BY_DISTANCE[name], *sizes), *blocks)
    assert not (kept & ~some).any()
    assert not (every & ~whole).any()
    assert (some & ~kept).double().mean() < 0.2
    assert (whole & ~every).double().mean() < 0.2
    assert undecided(BY_DISTANCE[name]) == ()


def test_what_cannot_be_decided_is_tested():
    """Powers of two and strides say little of blocks: such a pair is tested, and never skipped for that."""
    for rule in (sympy.Eq(Modulo(q - k, 3), 0), IsPowerOfTwo(q - k), sympy.Ne(of("far", q - k + LONGEST), 0)):
        some, every = listed(block_map, rule, (48, 48), (16, 16))
        assert (some & ~every).any()
        assert not every.any()


@pytest.mark.parametrize("name", EXACT)
def test_what_is_decided_is_not_reported(name):
    assert undecided(EXACT[name]) == ()


def test_what_is_undecided_is_reported():
    stride = sympy.Eq(Modulo(q - k, 3), 0)
    assert undecided(sympy.And(CAUSAL, sympy.Or(SAME, stride))) == (stride,)
    assert undecided(sympy.And(IsPowerOfTwo(q - k), PADDING)) == (IsPowerOfTwo(q - k),)
    assert undecided(IsPowerOfTwo(FloorDiv(q, 16) - FloorDiv(k, 16))) == ()
