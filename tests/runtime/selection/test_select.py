"""Forms that choose at run time: what is visited is what their eager definition keeps, and attention is over that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from comparing import assert_close
from sites import causal_site

import effattn
from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import IntLoad, Nk, Nq, k, load, q, s
from effattn.ir.plan import Plan, Sparsity
from effattn.lowering.forms import FORMS
from effattn.runtime.selection.places import places_of
from effattn.runtime.selection.run import select
from effattn.runtime.targets import portable

FROM_THE_END = k <= q + Nk - Nq
SCALE = 0.3


def plan_of(form: str, predicate=FROM_THE_END, captures=(), **params) -> Plan:
    chosen = FORMS[form]
    return Plan(
        form,
        AttentionSpec(SCALE * s, predicate, captures=captures, empty_rows="zero"),
        Sparsity(chosen.selector(chosen.params(**params), causal_site())),
    )


def made(heads=4, kv_heads=2, q_len=100, k_len=100, dim=16, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    return [torch.randn(batch, h, n, dim, generator=generator) for h, n in shapes]


def causal(q_len: int, k_len: int) -> torch.Tensor:
    return torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len


CASES = {
    "proxy": ("proxy", {"block": 16, "stride": 4, "key_stride": 4, "least": 32, "gamma": 0.7}),
    "proxy_few_queries": ("proxy", {"block": 16, "stride": 16, "least": 32, "gamma": 0.7}),
    "proxy_all_tokens": ("proxy", {"block": 16, "stride": 1, "least": 0, "gamma": 0.5}),
    "proxy_one_group": ("proxy", {"block": 16, "stride": 4, "least": 16, "gamma": 0.6, "groups": 1}),
    "proxy_groups": ("proxy", {"block": 16, "stride": 2, "key_stride": 8, "least": 16, "gamma": 0.6, "groups": 2}),
    "dhsa_blocks": ("dhsa", {"block": 32, "unit": 16, "share": 0.4, "local": 16, "sinks": 16}),
    "dhsa_small_share": ("dhsa", {"block": 16, "unit": 16, "share": 0.01, "local": 0, "sinks": 0}),
    "dhsa_wide_units": ("dhsa", {"block": 16, "unit": 32, "share": 0.4, "local": 40, "sinks": 5}),
    "dhsa_tokens": ("dhsa", {"block": 16, "unit": 1, "budget": 40, "chunk": 8, "local": 16, "sinks": 4}),
    "dhsa_tokens_cut": ("dhsa", {"block": 16, "unit": 1, "budget": 37, "chunk": 11, "local": 20, "sinks": 3}),
}
LENGTHS = [(1, 1), (17, 17), (100, 100), (33, 90), (1, 64), (64, 64), (96, 40)]


@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_visited_is_what_the_definition_keeps(name, q_len, k_len):
    form, params = CASES[name]
    query, key, _ = made(q_len=q_len, k_len=k_len)
    allowed = causal(q_len, k_len)
    wanted = FORMS[form].reference(FORMS[form].params(**params), query, key, allowed, SCALE)
    listed = select(plan_of(form, **params), query, key)
    got = listed.rows(0, q_len, query.shape[1], k_len)
    assert torch.equal(got & allowed, wanted & allowed)


@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_over_what_is_kept(name, q_len, k_len):
    form, params = CASES[name]
    query, key, value = made(q_len=q_len, k_len=k_len, heads=6)
    allowed = causal(q_len, k_len)
    kept = FORMS[form].reference(FORMS[form].params(**params), query, key, allowed, SCALE) & allowed
    out, lse = portable.run(plan_of(form, **params), query, key, value)
    wide_key, wide_value = (x.double().repeat_interleave(3, 1) for x in (key, value))
    scores = (query.double() @ wide_key.mT * SCALE).masked_fill(~kept, -torch.inf)
    assert_close(out, scores.softmax(-1).nan_to_num() @ wide_value, exact_dtype=False)
    assert_close(lse, scores.logsumexp(-1), exact_dtype=False)


@pytest.mark.parametrize(
    ("form", "params"),
    [
        ("proxy", {"gamma": 1.0, "block": 16, "least": 0}),
        ("proxy", {"gamma": 0.1, "block": 16, "least": 100}),
        ("dhsa", {"share": 1.0, "block": 16, "unit": 16}),
        ("dhsa", {"unit": 1, "budget": 100, "block": 16, "local": 16, "sinks": 0}),
    ],
)
def test_dense_at_full_budget(form, params):
    query, key, value = made()
    plan = plan_of(form, **params)
    assert plan.at(100).sparsity.select is None
    forced = replace(plan, sparsity=Sparsity(plan.sparsity.select.model_copy()))
    dense, dense_lse = portable.run(plan.dense(), query, key, value)
    for out, lse in (portable.run(plan.at(100), query, key, value), portable.run(forced, query, key, value)):
        assert_close(out, dense)
        assert_close(lse, dense_lse)


@pytest.mark.parametrize("name", CASES)
def test_lists_are_well_formed(name):
    """Own units first, no unit twice, nothing ahead of the block, never an empty list."""
    form, params = CASES[name]
    query, key, _ = made(q_len=90, k_len=130)
    plan = plan_of(form, **params)
    listed = select(plan, query, key)
    places = places_of(plan, 90, 130, (), (), (), torch.device("cpu"))
    assert listed.kv_indices.dtype == listed.kv_num_blocks.dtype == torch.int32
    for block in range(listed.kv_indices.shape[2]):
        own = set(range(int(places.first[block]), int(places.last[block]) + 1))
        assert int(listed.partial[0, 0, block]) == len(own) > 0
        most = listed.kv_num_blocks[:, :, block].amax(1)
        assert int(listed.kv_num_blocks[:, :, block].min()) >= len(own)
        for b in range(2):
            for one in listed.kv_indices[b, :, block]:
                units = one[: int(most[b])].tolist()
                assert set(units[: len(own)]) == own
                assert len(set(units)) == len(units)
                assert max(units) <= int(places.last[block])


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_never_chosen(left):
    batch, length = 3, 96
    query, key, value = made(batch=batch, q_len=length, k_len=length)
    pads = torch.tensor([0, 20, 50])[:, None]
    place = torch.arange(length)
    padding = (place >= pads) if left else (place < length - pads)
    seen = sympy.Ne(load("padding", [sympy.Symbol("b", integer=True, nonnegative=True), k], integer=True), 0)
    assert isinstance(seen.lhs, IntLoad)
    params = {"block": 16, "stride": 2, "least": 32, "gamma": 0.6}
    plan = plan_of("proxy", sympy.And(k <= q, seen), (CaptureSpec("padding", "bool", 2),), **params)
    allowed = causal(length, length) & padding[:, None, None]
    kept = FORMS["proxy"].reference(FORMS["proxy"].params(**params), query, key, allowed, SCALE) & allowed
    out, _ = portable.run(plan, query, key, value, [padding])
    wide_key, wide_value = (x.double().repeat_interleave(2, 1) for x in (key, value))
    scores = (query.double() @ wide_key.mT * SCALE).masked_fill(~kept, -torch.inf)
    assert_close(out, scores.softmax(-1).nan_to_num() @ wide_value, exact_dtype=False)


def test_documents_are_not_crossed():
    length = 128
    query, key, value = made(batch=1, q_len=length, k_len=length)
    ids = (torch.arange(length)[None] >= 70).long()
    b = sympy.Symbol("b", integer=True, nonnegative=True)
    same = sympy.Eq(load("ids", [b, q], integer=True), load("ids", [b, k], integer=True))
    plan = plan_of(
        "proxy", sympy.And(k <= q, same), (CaptureSpec("ids", "int64", 2),), block=16, stride=2, least=32, gamma=0.6
    )
    out, _ = portable.run(plan, query, key, value, [ids])
    value[:, :, :70] = torch.nan
    key_in_first, _ = portable.run(plan, query, key, value.nan_to_num(1e4), [ids])
    assert_close(out[:, :, 70:], key_in_first[:, :, 70:])


def test_more_coverage_only_adds():
    query, key, _ = made(q_len=160, k_len=160)
    before = None
    for gamma in (0.2, 0.5, 0.8, 0.95, 0.99):
        kept = select(plan_of("proxy", block=16, least=0, gamma=gamma), query, key).rows(0, 160, 4, 160)
        if before is not None:
            assert (kept | ~before).all()
        before = kept


def test_equal_scores_go_to_the_later_key():
    query, key = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 64, 16)
    listed = select(plan_of("dhsa", block=16, unit=16, share=0.5, local=0, sinks=0), query, key)
    assert listed.kv_indices[0, 0, 3, :2].tolist() == [3, 2]


def test_chunks_where_keys_change():
    """Four topics of keys: the dips lie at their borders, and a query of one topic takes that topic's tokens."""
    length, dim = 128, 16
    topics = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)))[0][:4] * 4
    borders = [0, 23, 60, 95, length]
    key = torch.cat([topics[i].expand(borders[i + 1] - borders[i], dim) for i in range(4)])[None, None]
    key = key + 0.05 * torch.randn(key.shape, generator=torch.Generator().manual_seed(2))
    query = topics[1].expand(1, 1, length, dim).contiguous()
    params = {"block": 16, "unit": 1, "budget": 16 + 37, "chunks": "dip", "local": 16, "sinks": 0}
    kept = select(plan_of("dhsa", **params), query, key).rows(0, length, 1, length)[0, 0, -1]
    assert kept[23:60].all()
    assert kept[112:].all()
    assert kept.sum() == 16 + 37


def test_chunks_given_by_the_caller():
    length = 80
    query, key, _ = made(batch=1, heads=2, q_len=length, k_len=length)
    bounds = [0, 5, 31, 33, 64, length]
    begins = torch.zeros(1, length, dtype=torch.bool)
    begins[0, bounds[1:-1]] = True
    params = {"block": 16, "unit": 1, "budget": 40, "chunks": "given", "local": 16, "sinks": 4}
    plan = plan_of("dhsa", captures=(CaptureSpec("boundaries", "bool", 2),), **params)
    allowed = causal(length, length)
    form = FORMS["dhsa"]
    wanted = form.reference(form.params(**params), query, key, allowed, SCALE, bounds)
    got = select(plan, query, key, [begins]).rows(0, length, 2, length)
    assert torch.equal(got & allowed, wanted & allowed)
    out = effattn.attention(query, key, key, form="dhsa", scale=SCALE, boundaries=begins, **params)
    assert_close(out, portable.run(plan, query, key, key, [begins])[0])
    for wrong, error in (({"boundaries": begins[0]}, ValueError), ({}, effattn.EffattnError)):
        with pytest.raises(error, match="boundaries"):
            effattn.attention(query, key, key, form="dhsa", **params, **wrong)
