"""Every kind of mask, in the spellings that people use, reads as the predicate that it is, whatever the lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled

B, H, N, D = 2, 3, 19, 8
MIN = torch.finfo(torch.float32).min
INF = float("inf")


def qkv(keys: int = N, queries: int = N):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, length, D, generator=generator) for length in (queries, keys, keys)]


def scores(q, k):
    return q @ k.transpose(-1, -2) * 0.25


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# -- causal ---------------------------------------------------------------------------------------------------------


def tril(q, k, v):
    n = q.shape[2]
    return scores(q, k).masked_fill(torch.tril(torch.ones(n, n)) == 0, -INF).softmax(-1) @ v


def tril_bool(q, k, v):
    n = q.shape[2]
    return torch.where(torch.ones(n, n, dtype=torch.bool).tril(), scores(q, k), MIN).softmax(-1) @ v


def triu_added(q, k, v):
    n = q.shape[2]
    return (scores(q, k) + torch.triu(torch.full((n, n), -INF), diagonal=1)).softmax(-1) @ v


def triu_times_billion(q, k, v):
    n = q.shape[2]
    return (scores(q, k) - torch.triu(torch.ones(n, n), 1) * 1e9).softmax(-1) @ v


def one_minus_mask(q, k, v):
    n = q.shape[2]
    mask = torch.ones(1, 1, n, n).tril()
    return (scores(q, k) + (1.0 - mask) * MIN).softmax(-1) @ v


def keys_at_most_queries(q, k, v):
    i = torch.arange(q.shape[2])
    return sdpa(q, k, v, i[None, :] <= i[:, None])


def queries_at_least_keys(q, k, v):
    i = torch.arange(q.shape[2])
    return sdpa(q, k, v, (i[:, None] >= i[None, :]).expand(1, 1, -1, -1))


def not_future(q, k, v):
    i = torch.arange(q.shape[2])
    return scores(q, k).masked_fill(~(i < i.view(-1, 1) + 1), MIN).softmax(-1) @ v


def distance(q, k, v):
    i = torch.arange(q.shape[2])
    return torch.where(i[:, None] - i[None, :] < 0, -INF, scores(q, k)).softmax(-1) @ v


def float_positions(q, k, v):
    i = torch.arange(q.shape[2], dtype=torch.float32)
    return scores(q, k).masked_fill(i[None] > i[:, None], -1e9).softmax(-1) @ v


def cumulative(q, k, v):
    i = torch.ones(q.shape[2], dtype=torch.long).cumsum(0) - 1
    return sdpa(q, k, v, i[None, :] <= i[:, None])


def scaled_after_the_mask(q, k, v):
    n = q.shape[2]
    return ((q @ k.mT + torch.full((n, n), MIN).triu(1)) / math.sqrt(D)).softmax(-1) @ v


def multiplied_and_shifted(q, k, v):
    n = q.shape[2]
    mask = torch.ones(n, n).tril()
    return (scores(q, k) * mask - 1e9 * (1 - mask)).softmax(-1) @ v


def limited_from_below(q, k, v):
    n = q.shape[2]
    added = scores(q, k) + torch.full((n, n), MIN).triu(1)
    return torch.max(added, torch.tensor(MIN)).softmax(-1) @ v


def mask_of_a_longer_buffer(q, k, v):
    buffer = torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64)
    n = q.shape[2]
    return torch.where(buffer[:, :, n - n : n, :n], scores(q, k), MIN).softmax(-1) @ v


def is_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def twice(q, k, v):
    n = q.shape[2]
    i = torch.arange(n)
    seen = scores(q, k).masked_fill(i[None] > i[:, None], -INF)
    return (seen + torch.full((n, n), -INF).triu(1)).softmax(-1) @ v


def filled_in_place(q, k, v):
    n = q.shape[2]
    mask = torch.zeros(n, n)
    mask.masked_fill_(torch.arange(n)[None, :] > torch.arange(n)[:, None], -INF)
    return (scores(q, k) + mask).softmax(-1) @ v


def long_names(q, k, v):
    queries = torch.arange(q.shape[2])[:, None]
    keys = queries.T
    seen = torch.less_equal(keys, queries) & queries.greater_equal(keys) & torch.less(keys, queries + 1)
    hidden = torch.greater(keys, queries) | torch.not_equal(seen, True)
    return scores(q, k).masked_fill(hidden, -INF).softmax(-1) @ v


CAUSAL = [
    tril, tril_bool, triu_added, triu_times_billion, one_minus_mask, keys_at_most_queries, queries_at_least_keys,
    not_future, distance, float_positions, cumulative, scaled_after_the_mask, multiplied_and_shifted,
    limited_from_below, mask_of_a_longer_buffer, is_causal, twice, filled_in_place,
    long_names,
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", CAUSAL, ids=lambda function: function.__name__)
def test_causal(spelling, dynamic):
    report, _ = compiled(spelling, *qkv(), lengths=(0, 2) if dynamic else ())
    assert [site.predicate for site in report.sites] == ["k <= q"], report
    assert report.sites[0].empty_rows == "never"
    assert "effattn.attend" not in report.graph(), "SDPA's own causal kernel computes it"


# -- everything else ------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A function of q, k, v and more; what its mask and score read as."""

    function: Any
    predicate: str
    more: tuple = ()
    score: str = "0.25*s"
    empty_rows: str = "never"
    keys: int = N
    queries: int = N
    dynamic: str | None = None  # the predicate with symbolic lengths, where it differs

    @property
    def name(self) -> str:
        return self.function.__name__


def positions(q, k):
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]


def window(q, k, v):
    i, j = positions(q, k)
    return scores(q, k).masked_fill(~((j <= i) & (j > i - 4)), -INF).softmax(-1) @ v


def window_of_triangles(q, k, v):
    n = q.shape[2]
    ones = torch.ones(n, n, dtype=torch.bool)
    return scores(q, k).masked_fill(~(ones.tril() & ones.triu(-3)), -INF).softmax(-1) @ v


def window_of_differences(q, k, v):
    n = q.shape[2]
    ones = torch.ones(n, n)
    return scores(q, k).masked_fill((ones.tril() - ones.tril(-4)) == 0, MIN).softmax(-1) @ v


def window_to_both_sides(q, k, v):
    i, j = positions(q, k)
    return scores(q, k).masked_fill((i - j).abs() >= 4, -INF).softmax(-1) @ v


def causal_from_both_sides(q, k, v):
    i, j = positions(q, k)
    return scores(q, k).masked_fill(((i - j).abs() >= 4) | (j > i), MIN).softmax(-1) @ v


def window_and_sinks(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, (j <= i) & ((i - j < 4) | (j < 2)))


def offset_constant(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, j <= i + (k.shape[2] - q.shape[2]))


def offset_triangle(q, k, v):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scores(q, k).masked_fill(~mask, -INF).softmax(-1) @ v


def offset_slice(q, k, v):
    n = k.shape[2]
    mask = torch.ones(n, n, dtype=torch.bool).tril()[n - q.shape[2] :]
    return scores(q, k).masked_fill(~mask, -INF).softmax(-1) @ v


def offset_tensor(q, k, v, past):
    i, j = positions(q, k)
    return sdpa(q, k, v, j <= i + past)


def offset_positions(q, k, v, cache_position):
    j = torch.arange(k.shape[2])
    return sdpa(q, k, v, j[None, :] <= cache_position[:, None])


def lookahead(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, j <= i + 3)


def prefix(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, (j <= i) | (j < 5))


def prefix_lengths(q, k, v, lengths):
    i, j = positions(q, k)
    return sdpa(q, k, v, (j <= i) | (j < lengths[:, None, None, None]))


def chunked(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, (j // 4 == i // 4) & (j <= i))


def block_diagonal(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, j // 4 == i // 4)


def sum_and_product_of_booleans(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = ((j <= i) + (j < 3)) * (j < 9)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def dilated(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, (j <= i) & ((i - j) % 2 == 0))


def blocks_of_a_table(q, k, v):
    table = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = table.repeat_interleave(4, 0).repeat_interleave(4, 1)[: q.shape[2], : k.shape[2]]
    return sdpa(q, k, v, mask)


def padding_bool(q, k, v, padding):
    return scores(q, k).masked_fill(~padding[:, None, None, :], -INF).softmax(-1) @ v


def padding_int(q, k, v, padding):
    return scores(q, k).masked_fill(padding[:, None, None, :] == 0, MIN).softmax(-1) @ v


def padding_int_to_bool(q, k, v, padding):
    return sdpa(q, k, v, padding.to(torch.bool)[:, None, None, :].expand(-1, 1, q.shape[2], -1))


def padding_float(q, k, v, padding):
    return (scores(q, k) + (1.0 - padding[:, None, None, :]) * MIN).softmax(-1) @ v


def padding_float_compared(q, k, v, padding):
    return scores(q, k).masked_fill(padding[:, None, None, :] < 0.5, MIN).softmax(-1) @ v


def padding_lengths(q, k, v, lengths):
    j = torch.arange(k.shape[2])
    return sdpa(q, k, v, (j[None, :] < lengths[:, None])[:, None, None, :])


def padding_on_both_sides(q, k, v, padding):
    return sdpa(q, k, v, padding[:, None, :, None] & padding[:, None, None, :])


def padding_and_causal(q, k, v, padding):
    i, j = positions(q, k)
    return sdpa(q, k, v, (j <= i) & padding[:, None, None, :])


def padding_or_future(q, k, v, padding):
    i, j = positions(q, k)
    hidden = (j > i)[None] | (padding == 0)[:, None, :]
    return scores(q, k).masked_fill(hidden[:, None], -INF).softmax(-1) @ v


def padding_added_and_causal(q, k, v, padding):
    n = q.shape[2]
    added = torch.zeros(1).masked_fill(~padding[:, None, None, :], -INF) + torch.full((n, n), -INF).triu(1)
    return (scores(q, k) + added).softmax(-1) @ v


def documents(q, k, v, ids):
    i, j = positions(q, k)
    return sdpa(q, k, v, ((ids[:, :, None] == ids[:, None, :]) & (j <= i))[:, None])


def documents_of_positions(q, k, v, position_ids):
    ids = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    i, j = positions(q, k)
    return sdpa(q, k, v, ((ids[:, :, None] == ids[:, None, :]) & (j <= i))[:, None])


def documents_of_plain_positions(q, k, v):
    position_ids = torch.arange(q.shape[2])[None]
    ids = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    i, j = positions(q, k)
    return sdpa(q, k, v, ((ids[:, :, None] == ids[:, None, :]) & (j <= i))[:, None].expand(q.shape[0], -1, -1, -1))


def documents_of_cu_seqlens(q, k, v, cu_seqlens):
    ids = torch.searchsorted(cu_seqlens, torch.arange(q.shape[2]), right=True)
    i, j = positions(q, k)
    return sdpa(q, k, v, (ids[:, None] == ids[None, :]) & (j <= i))


def documents_by_index(q, k, v, ids):
    i, j = positions(q, k)
    batch = torch.arange(q.shape[0])[:, None, None, None]
    same = ids[batch, i[None, None]] == ids[batch, j[None, None]]
    return sdpa(q, k, v, same & (j <= i))


def segments_and_padding(q, k, v, ids):
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return sdpa(q, k, v, same & (ids > 0)[:, None, None, :])


def alibi(q, k, v, slopes):
    i, j = positions(q, k)
    return (scores(q, k) - slopes[:, None, None] * (i - j)).masked_fill(j > i, -INF).softmax(-1) @ v


def alibi_of_keys(q, k, v, slopes):
    i, j = positions(q, k)
    return (scores(q, k) + slopes.view(1, -1, 1, 1) * j).masked_fill(j > i, MIN).softmax(-1) @ v


def alibi_from_heads(q, k, v):
    i, j = positions(q, k)
    head = torch.arange(1, H + 1).view(-1, 1, 1)
    return (scores(q, k) - 0.125 * head * (i - j).abs()).softmax(-1) @ v


def soft_cap(q, k, v):
    i, j = positions(q, k)
    return (torch.tanh(scores(q, k) / 2.0) * 2.0).masked_fill(j > i, -INF).softmax(-1) @ v


def heads_of_two_kinds(q, k, v, local):
    i, j = positions(q, k)
    return sdpa(q, k, v, (j <= i) & (~local[:, None, None] | (i - j < 4)))


LEFT = torch.arange(N) >= torch.tensor([[3], [0]])
RIGHT = torch.arange(N) < torch.tensor([[N], [11]])
IDS = torch.tensor([[1] * 7 + [2] * 9 + [3] * 3, [1] * 12 + [2] * 7])
RESET = torch.cat([torch.arange(7), torch.arange(9), torch.arange(3)]).expand(B, N).contiguous()
S2 = D**-0.5
SLOPES = 2.0 ** -torch.arange(1, H + 1)
SDPA = f"{S2:.8g}*s"

CASES = [
    Case(window, "k <= q & q - k < 4"),
    Case(window_of_triangles, "k <= q & q - k < 4"),
    Case(window_of_differences, "k <= q & q - k < 4"),
    Case(window_to_both_sides, "q - k < 4 & k <= 3 + q"),
    Case(causal_from_both_sides, "k <= q & q - k < 4"),
    Case(window_and_sinks, "k <= q & (k < 2 | q - k < 4)", score=SDPA),
    Case(offset_constant, "k <= 14 + q", score=SDPA, queries=5, dynamic="k <= q + Nk - Nq"),
    Case(offset_triangle, "k <= 14 + q", queries=5, dynamic="k <= q + Nk - Nq"),
    Case(offset_slice, "k <= 14 + q", queries=5, dynamic="mask[q, k]"),  # the slice may begin before the first row
    Case(offset_tensor, "k <= q + offset", (torch.tensor(14),), score=SDPA, queries=5, empty_rows="zero"),
    Case(offset_positions, "k <= rows[q]", (torch.arange(14, 19),), score=SDPA, queries=5, empty_rows="zero"),
    Case(lookahead, "k <= 3 + q", score=SDPA),
    Case(prefix, "k < 5 | k <= q", score=SDPA),
    Case(prefix_lengths, "k <= q | k < lengths[b]", (torch.tensor([4, 6]),), score=SDPA),
    Case(chunked, "k <= q & k//4 == q//4", score=SDPA),
    Case(block_diagonal, "k//4 == q//4", score=SDPA),
    Case(sum_and_product_of_booleans, "k < 9 & (k < 3 | k <= q)", score=SDPA),
    Case(dilated, "k <= q & (q - k)%2 == 0", score=SDPA),
    Case(blocks_of_a_table, "k//4 <= q//4", score=SDPA),
    Case(padding_bool, "padding[b, k]", (RIGHT,), empty_rows="nan"),
    Case(padding_int, "padding[b, k]", (RIGHT.long(),), empty_rows="mean"),
    Case(padding_int_to_bool, "padding[b, k]", (RIGHT.to(torch.int32),), score=SDPA, empty_rows="zero"),
    Case(padding_float, "true", (RIGHT.float(),), score="0.25*s + bias[b, 0, 0, k]", empty_rows="nan"),
    Case(padding_float_compared, "0.5 <= padding[b, k]", (RIGHT.float(),), empty_rows="mean"),
    Case(padding_lengths, "k < lengths[b]", (torch.tensor([N, 11]),), score=SDPA, empty_rows="zero"),
    Case(padding_on_both_sides, "padding[b, k] & padding[b, q]", (RIGHT,), score=SDPA, empty_rows="zero"),
    Case(padding_and_causal, "k <= q & padding[b, k]", (LEFT,), score=SDPA, empty_rows="zero"),
    Case(padding_or_future, "k <= q & padding[b, k]", (LEFT.int(),), empty_rows="nan"),
    Case(padding_added_and_causal, "k <= q & padding[b, k]", (LEFT,), empty_rows="nan"),
    Case(documents, "k <= q & document[b, q] == document[b, k]", (IDS,), score=SDPA),
    Case(documents_of_positions, "k <= q & document[b, q] == document[b, k]", (RESET,), score=SDPA),
    Case(documents_of_plain_positions, "k <= q", score=SDPA),
    Case(documents_of_cu_seqlens, "k <= q & document[q] == document[k]", (torch.tensor([0, 7, 16]),), score=SDPA),
    Case(documents_by_index, "k <= q & document[b, q] == document[b, k]", (IDS,), score=SDPA),
    Case(
        segments_and_padding,
        "0 < document[b, k] & document[b, q] == document[b, k]",
        (IDS * RIGHT,),
        score=SDPA,
        empty_rows="zero",
    ),
    Case(alibi, "k <= q", (SLOPES,), score="0.25*s - (q - k)*slopes[h]"),
    Case(alibi_of_keys, "k <= q", (SLOPES,), score="0.25*s + k*slopes[h]"),
    Case(alibi_from_heads, "true", score="0.25*s - 0.125*Abs(k - q)*(1 + h)"),
    Case(soft_cap, "k <= q", score="2*tanh(0.125*s)"),
    Case(heads_of_two_kinds, "k <= q & (q - k < 4 | ~heads[h])", (torch.tensor([True, False, True]),), score=SDPA),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_read(case, dynamic):
    report, _ = compiled(case.function, *qkv(case.keys, case.queries), *case.more, lengths=(0, 2) if dynamic else ())
    assert report.missed == []
    (site,) = report.sites
    assert site.predicate == ((dynamic and case.dynamic) or case.predicate)
    assert site.score == case.score
    if not dynamic:  # with two lengths of which nothing is known there may be rows beyond all keys
        assert site.empty_rows == case.empty_rows


# -- lengths stay symbolic ------------------------------------------------------------------------------------------


def counted(function, backend: str):
    """(compiled function, list that grows by one for every graph that is compiled)."""
    from effattn.compiler.backend import effattn

    graphs: list[int] = []

    def compile_graph(gm, example_inputs):
        graphs.append(len(gm.graph.nodes))
        if backend == "eager":
            return gm.forward
        return effattn(gm, example_inputs, options={"rest": "eager", "strict": True})

    torch._dynamo.reset()
    return torch.compile(function, backend=compile_graph), graphs


def with_lengths(case: Case, batch: int, queries: int, keys: int):
    """Arguments of a case at other lengths."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, H, length, D, generator=generator) for length in (queries, keys, keys))
    more = []
    for value in case.more:
        sizes = [{B: batch, N: keys, 5: queries}.get(size, size) for size in value.shape]
        if value.dim() == 1 and sizes[0] == keys and case.function is offset_positions:
            sizes[0] = queries
        index = [torch.arange(size) % old for size, old in zip(sizes, value.shape, strict=True)]
        more.append(value[torch.meshgrid(*index, indexing="ij")] if index else value)
    return q, k, v, *more


SYMBOLIC = [window, offset_constant, offset_tensor, prefix_lengths, chunked, padding_and_causal, documents_of_positions]


@pytest.mark.parametrize("function", SYMBOLIC, ids=lambda function: function.__name__)
def test_one_graph_serves_all_lengths(function):
    (case,) = [case for case in CASES if case.function is function]
    runs = {}
    for backend in ("eager", "effattn"):
        fast, graphs = counted(function, backend)
        for batch, queries, keys in ((2, 17, 17), (3, 33, 33), (4, 64, 64), (5, 12, 12), (2, 7, 29), (3, 9, 40)):
            if queries != keys and "offset" not in function.__name__:
                continue
            args = with_lengths(case, batch, queries, keys)
            assert_close(fast(*args), function(*args))
        runs[backend] = graphs
    assert len(runs["effattn"]) == len(runs["eager"]), "no guard of ours"
    assert len(runs["effattn"]) <= 3


POSITIONS = [
    (window, {}, "q"),
    (offset_constant, {"queries": 5}, "14 + q"),
    (offset_tensor, {"queries": 5, "more": (torch.tensor(14),)}, "q + offset"),
    (offset_tensor, {"queries": 1, "more": (torch.tensor(14),)}, "q + offset"),
    (padding_and_causal, {"more": (LEFT,)}, "q"),
    (window_to_both_sides, {}, None),
    (lookahead, {}, None),
    (block_diagonal, {}, None),
    (padding_lengths, {"more": (torch.tensor([N, 11]),)}, None),
]


@pytest.mark.parametrize(
    ("function", "options", "position"), POSITIONS, ids=lambda value: getattr(value, "__name__", "")
)
def test_position_of_a_query_among_the_keys(function, options, position):
    """Forms that measure distances need it; a row that sees what comes after it has none."""
    from effattn.compiler.report import collect
    from effattn.ir.text import text

    more = options.get("more", ())
    with collect.listening() as heard:
        compiled(function, *qkv(N, options.get("queries", N)), *more)
    (choice,) = heard.choices
    found = choice.match.site.position
    assert (found if found is None else text(found)) == position
