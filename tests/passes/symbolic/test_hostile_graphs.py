"""Graphs whose expressions grow without end when they are written out: reading stops, and says so."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled

from effattn.ir.expr import tree_size
from effattn.ir.refusal import Why
from effattn.passes.symbolic import reader
from effattn.passes.symbolic.reader import MAX_OPERATIONS, MAX_WORK

N = 16


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, N, 8, generator=generator) for _ in range(3)]


def places():
    place = torch.arange(N)
    return place[None], place[:, None]


def doubled(scores):
    """Twice as large with every line."""
    k, q = places()
    x = (k - q).float()
    for _ in range(24):
        x = x * torch.tanh(x) + x
    return scores + x


def doubled_scores(scores):
    for _ in range(40):
        scores = scores * torch.tanh(scores)
    return scores


def alternatives(scores):
    k, q = places()
    seen = k <= q
    for n in range(24):
        seen = (seen & (k % (n + 2) != 0)) | (~seen & (q % (n + 3) == 1)) | (k == q)
    return scores.masked_fill(~seen, -1e30)


def exclusive(scores):
    k, q = places()
    seen = k <= q
    for n in range(24):
        seen = seen ^ (k % (n + 2) != 0) | (k == q)
    return scores.masked_fill(~seen, -1e30)


def halves(scores):
    """Nothing grows but the number of elements that one element takes."""
    x = torch.ones(2**14)
    for _ in range(14):
        x = x[::2] + x[1::2]
    return scores + x


def shuffled(scores):
    """Indices that grow."""
    k, q = places()
    x = k * q
    for _ in range(12):
        x = (x.reshape(N // 2, -1).mT.reshape(N, N) + x) % 7
    return scores.masked_fill((x % 3 == 0) & (k != q), -1e30)


def many_masks(scores):
    k, q = places()
    for n in range(60):
        scores = scores.masked_fill(k == q + n + 1, -1e30)
    return scores


def deep(scores):
    k, q = places()
    seen = k <= q
    for n in range(250):
        seen = torch.where(k % (n + 2) == 0, seen, q >= k)
    return scores.masked_fill(~seen, -1e30)


HOSTILE = (doubled, doubled_scores, alternatives, exclusive, halves, shuffled, many_masks, deep)


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_reading_ends(change, monkeypatch):
    """Counted, not timed: what is read for one element is bounded, and so is what is kept of a node."""
    most = {"work": 0, "size": 0, "steps": 0}
    bounded = reader.Reader._bounded

    def counting(self, node, at):
        def counted(index):
            most["steps"] += 1
            value = at(index)
            most["work"] = max(most["work"], self._work)
            return value

        inner = bounded(self, node, counted)

        def kept(index):
            value = inner(index)
            most["size"] = max(most["size"], tree_size(value, self._sizes))
            return value

        return kept

    monkeypatch.setattr(reader.Reader, "_bounded", counting)

    def function(q, k, v):
        return change(q @ k.mT * 0.3).softmax(-1) @ v

    report, _ = compiled(function, *qkv(), tolerance=1e-4, strict=False, verify=False)
    assert len(report.sites) + len(report.missed) == 1
    assert all(missed.rule in (Why.SIZE, Why.READING, Why.NO_PRODUCT, Why.SCORE_AND_MASK) for missed in report.missed)
    assert most["size"] <= MAX_OPERATIONS
    assert most["work"] <= MAX_WORK + 3 * MAX_OPERATIONS
    assert most["steps"] < 100_000


def test_a_refusal_says_how_large_it_is():
    def function(q, k, v):
        return doubled_scores(q @ k.mT).softmax(-1) @ v

    report, _ = compiled(function, *qkv(), tolerance=1e-4, strict=False)
    (missed,) = report.missed
    assert f"more than {MAX_OPERATIONS} operations" in missed.reason


def test_weights_added_to_themselves():
    def function(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        for _ in range(40):
            weights = weights + weights
        return weights @ v

    report, _ = compiled(function, *qkv(), tolerance=1e-4)
    assert report.missed[0].rule == Why.WEIGHTS


def test_data_at_places_that_are_data():
    order, owner = torch.randperm(N, generator=torch.Generator().manual_seed(1)), torch.arange(N) // 4

    def function(q, k, v, order, owner):
        seen = owner[order][None] <= torch.arange(N)[:, None]
        return (q @ k.mT).masked_fill(~seen, -1e30).softmax(-1) @ v

    report, _ = compiled(function, *qkv(), order, owner)
    assert len(report.sites) == 1


def test_a_term_is_counted_as_it_is_written_out():
    x = reader.generic_index(1)[0]
    term = x
    for _ in range(100):
        term = reader.expr.Where(x > 3, term, -term)
    assert tree_size(term, {}) > 2**100
