"""Scores and picks by generated kernels on Triton's interpreter, against the same through ATen."""

from __future__ import annotations

import pytest
import sympy
import torch
from comparing import assert_close

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import Nk, Nq, b, k, load, q, s
from effattn.ir.plan import Plan, Sparsity
from effattn.ir.selector import Expand, Last, Pick, Reduce, Score, Selector, Strided, TopP
from effattn.runtime.selection import portable_steps, triton_steps
from effattn.runtime.selection.places import places_of
from effattn.runtime.selection.run import select

FROM_THE_END = k <= q + Nk - Nq


def plan_of(block=16, stride=4, lists=1, gamma=0.7, least=32, predicate=FROM_THE_END, captures=(), unit=None) -> Plan:
    every = Strided(stride=stride)
    budget = TopP(
        gamma=gamma,
        least=least,
        score=Score(query=Last(size=block), key=Strided(), softmax=True),
        reduce=Reduce(rows="mean", columns="sum"),
    )
    selector = Selector(
        score=Score(query=every, key=every, lists=lists, softmax=True),
        pick=Pick(budget=budget, sinks=block),
        expand=Expand(block=block, unit=unit or block),
    )
    return Plan("proxy", AttentionSpec(0.3 * s, predicate, captures=captures), Sparsity(selector))


def made(q_len=70, k_len=90, heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim))
    return [torch.randn(2, *shape, generator=generator).to(dtype) for shape in shapes]


def both(plan, score, reduce, query, key, captures=()):
    given = (plan, score, reduce, query, key, captures, (), ())
    found = [steps.Scorer(*given) for steps in (triton_steps, portable_steps)]
    return [scorer.of(0, scorer.blocks) for scorer in found]


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (17, 17), (70, 90), (130, 200), (40, 20)])
@pytest.mark.parametrize("which", ["ranking", "mass"])
def test_scores(which, q_len, k_len):
    plan = plan_of()
    budget = plan.sparsity.select.pick.budget
    score, reduce = (
        (plan.sparsity.select.score, plan.sparsity.select.reduce)
        if which == "ranking"
        else (budget.score, budget.reduce)
    )
    ours, wanted = both(plan, score, reduce, *made(q_len, k_len))
    assert_close(ours, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"block": 256, "stride": 1},  # wider than a tile on both sides
        {"block": 128, "stride": 4},
        {"block": 16, "stride": 16},
        {"block": 64, "stride": 2, "unit": 16},
        {"block": 16, "stride": 2, "unit": 256},
    ],
    ids=str,
)
@pytest.mark.parametrize("lists", [0, 1, 2])
def test_sizes(options, lists):
    plan = plan_of(lists=lists, **options)
    ours, wanted = both(plan, plan.sparsity.select.score, plan.sparsity.select.reduce, *made(150, 300, dim=24))
    assert_close(ours, wanted)


def test_splits_add_up(monkeypatch):
    monkeypatch.setattr(triton_steps, "splits_for", lambda row_tiles, keys: 4)
    plan = plan_of()
    budget = plan.sparsity.select.pick.budget
    ours, wanted = both(plan, budget.score, budget.reduce, *made(70, 300))
    assert_close(ours, wanted)


def test_masks_on_data():
    padding = torch.arange(90) >= torch.tensor([0, 75])[:, None]
    seen = sympy.Ne(load("padding", [b, k], integer=True), 0)
    plan = plan_of(predicate=sympy.And(FROM_THE_END, seen), captures=(CaptureSpec("padding", "bool", 2),))
    budget = plan.sparsity.select.pick.budget
    for score, reduce in ((plan.sparsity.select.score, plan.sparsity.select.reduce), (budget.score, budget.reduce)):
        ours, wanted = both(plan, score, reduce, *made(), [padding])
        assert_close(ours, wanted)


def first_ones(listed, head):
    """What each block of the query head ``head`` of the first batch row visits, as lists of units in their order."""
    order, count = listed.kv_indices[0], listed.kv_num_blocks[0]
    index, number = head * order.shape[0] // count.shape[0], count[head]
    return [order[index, block, : number[block]].tolist() for block in range(order.shape[1])]


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (17, 17), (70, 90), (64, 300)])
@pytest.mark.parametrize("lists", [0, 1, 2])
@pytest.mark.parametrize("least", [0, 48])
def test_lists_are_the_same(q_len, k_len, lists, least):
    plan, inputs = plan_of(lists=lists, block=16, least=least, gamma=0.5), made(q_len, k_len)
    ours, wanted = (select(plan, *inputs, steps=steps) for steps in (triton_steps, portable_steps))
    assert torch.equal(ours.kv_num_blocks, wanted.kv_num_blocks)
    assert torch.equal(ours.partial, wanted.partial)
    for head in range(4):
        for partial, one, other in zip(
            ours.partial[0, 0], first_ones(ours, head), first_ones(wanted, head), strict=True
        ):
            assert len(set(one)) == len(one)
            assert set(one) == set(other)
            assert set(one[:partial]) == set(other[:partial])


def test_what_more_heads_visit_comes_first_and_in_the_order_of_keys():
    listed = select(plan_of(lists=1, least=0, gamma=0.6), *made(64, 500), steps=triton_steps)
    smallest = listed.kv_num_blocks.min(dim=1).values
    assert (listed.kv_num_blocks != smallest[:, None]).any()
    for block, partial in enumerate(listed.partial[0, 0]):
        whole = listed.kv_indices[0, 0, block, : smallest[0, block]].tolist()
        assert whole[:partial] == sorted(whole[:partial])
        assert whole[partial:] == sorted(whole[partial:])
        assert max(whole[:partial]) == max(whole)


def chosen(scores, number, pick, places):
    """The units that each way chooses of scores [1, 1, M, U], a list of sets for each."""
    found = []
    for steps in (triton_steps, portable_steps):
        order = torch.full_like(scores, -1, dtype=torch.int32)
        count = torch.full((1, 1, scores.shape[2]), number, dtype=torch.int32).minimum(places.eligible.to(torch.int32))
        steps.choose_into(order, slice(0, scores.shape[2]), scores, count, pick, 16, places)
        found.append([set(row[:n].tolist()) for row, n in zip(order[0, 0], count[0, 0], strict=True)])
    return found


@pytest.mark.parametrize("number", [4, 5, 6, 8])
def test_ties_forced_units_and_nan(number):
    plan = plan_of(block=16)
    places = places_of(plan, 64, 128, (), (), (), torch.device("cpu"))
    pick = Pick(budget=plan.sparsity.select.pick.budget, sinks=16, local=40)
    scores = torch.zeros(1, 1, 4, 8)
    scores[..., 2], scores[..., 1] = torch.nan, 5.0
    ours, wanted = chosen(scores, number, pick, places)
    assert ours == wanted
    assert ours[3] == set([7, 6, 5, 0, 1, 4, 3, 2][:number])  # own, forced, best, the later of two equals, NaN


@pytest.mark.parametrize("number", [1, 2, 30, 77])
def test_the_best_of_many(number):
    plan = plan_of(block=16)
    places = places_of(plan, 64, 77 * 16, (), (), (), torch.device("cpu"))
    pick = Pick(budget=plan.sparsity.select.pick.budget)
    scores = torch.randn(1, 1, 4, 77, generator=torch.Generator().manual_seed(5)).mul(1e3).round(decimals=-2)
    scores[..., 5], scores[..., 6] = torch.inf, -torch.inf
    ours, wanted = chosen(scores, number, pick, places)
    assert ours == wanted


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 0.999])
def test_counts_cover_the_mass(gamma):
    plan = plan_of(block=16, gamma=gamma, least=0)
    places = places_of(plan, 64, 200, (), (), (), torch.device("cpu"))
    mass = torch.rand(2, 4, 1, 13, generator=torch.Generator().manual_seed(3)) ** 4
    budget = plan.sparsity.select.pick.budget
    ours, wanted = (
        steps.top_p_counts(budget, mass, plan.sparsity.select.pick, 16, places)
        for steps in (triton_steps, portable_steps)
    )
    assert torch.equal(ours, wanted)
