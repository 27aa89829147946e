"""Counted pairs against masks, perplexity against whole logits."""

from __future__ import annotations

import types

import pytest
import sympy
import torch

from effattn.errors import FormRefused
from effattn.evaluate import density_of, kept_pairs, perplexity, timed
from effattn.ir import expr
from effattn.ir.refusal import Why
from effattn.lowering.forms import FORMS

CASES = [
    ("exact", {}),
    ("window", {"window": 16, "sinks": 4}),
    ("window", {"window": 5, "sinks": 0}),
    ("window", {"window": 1, "sinks": 300}),
    ("power", {"block": 16, "window": 32, "sinks": 16}),
    ("power", {"block": 32, "window": 32, "sinks": 0}),
    ("power", {"block": 16, "window": 64, "sinks": 21}),
]


@pytest.mark.parametrize("length", [1, 17, 257, 640])
@pytest.mark.parametrize(("form", "params"), CASES, ids=str)
def test_density_counts_what_the_reference_keeps(form, params, length):
    index = torch.arange(length)
    mask = FORMS[form].reference(FORMS[form].params(**params), index[:, None], index[None, :])
    causal = index[None, :] <= index[:, None]
    expected = int((mask & causal).sum()) / int(causal.sum())
    assert density_of(form, length, params) == pytest.approx(expected, abs=1e-12)


def test_shorter_than_the_policy_says_is_dense():
    assert density_of("window", 64, {"window": 8, "sinks": 0}, min_length=65) == 1.0
    assert density_of("window", 64, {"window": 8, "sinks": 0}, min_length=64) < 0.3


def test_a_million_rows_take_no_mask():
    density = density_of("power", 1 << 20, {"block": 128, "window": 2048, "sinks": 128})
    assert 0.002 < density < 0.01


def test_rows_and_keys_may_differ_in_number():
    offset = 7
    predicate = sympy.And(expr.k <= expr.q + offset, expr.q + offset - expr.k < 5)
    rows, keys = torch.arange(13)[:, None], torch.arange(20)[None, :]
    expected = ((keys <= rows + offset) & (rows + offset - keys < 5)).sum()
    assert kept_pairs(predicate, 13, 20) == int(expected)


def test_data_cannot_be_counted():
    padding = sympy.Ne(expr.load("padding", (expr.b, expr.k), integer=True), 0)
    with pytest.raises(FormRefused) as caught:
        kept_pairs(sympy.And(expr.k <= expr.q, padding), 4, 4)
    assert [refusal.rule for refusal in caught.value.refusals] == [Why.DATA_MASK]


class _Model:
    """A linear head over an embedding, with the names of a transformers model."""

    def __init__(self, cap=None):
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)
        self.config = types.SimpleNamespace(final_logit_softcapping=cap)

    def get_output_embeddings(self):
        return self.head

    def base_model(self, ids, use_cache):
        return types.SimpleNamespace(last_hidden_state=self.embedding(ids))


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_perplexity_in_chunks_is_perplexity(cap, chunk):
    model = _Model(cap)
    ids = torch.randint(0, 11, (1, 23), generator=torch.Generator().manual_seed(1))
    logits = model.head(model.embedding(ids))[0, :-1]
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item()
    measured = perplexity(model, ids, chunk=chunk)
    assert measured.value == pytest.approx(expected, rel=1e-5)
    assert measured.tokens == 22


@pytest.mark.parametrize("shape", [(1, 1), (2, 8), (8,)])
def test_perplexity_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\[1, N\]"):
        perplexity(_Model(), torch.zeros(shape, dtype=torch.int64))


def test_timed_calls_once_more_than_it_repeats():
    calls = []
    timing = timed(lambda: calls.append(1) or len(calls), repeats=3)
    assert timing.value == 4
    assert len(timing.later) == 3
    assert timing.median >= 0
