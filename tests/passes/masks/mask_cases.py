"""Masks in the spellings that people use, and the predicate that each is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

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


def positions_of_documents(q, k, v, position_ids):
    """As transformers masks packed text: it compares positions, and a sliding window counts them."""
    ids = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    i, j = position_ids[:, None, :, None], position_ids[:, None, None, :]
    return sdpa(q, k, v, (j <= i) & (j > i - 5) & (ids[:, None, :, None] == ids[:, None, None, :]))


def positions_of_other_documents(q, k, v, position_ids):
    """Documents that begin where positions do not tell: what is compared stays data."""
    ids = (torch.diff(position_ids, prepend=position_ids[:, :1], dim=-1) < 0).cumsum(-1)
    i, j = position_ids[:, None, :, None], position_ids[:, None, None, :]
    return sdpa(q, k, v, (j <= i) & (ids[:, None, :, None] == ids[:, None, None, :]))


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
    Case(positions_of_documents, "k <= q & q - k < 5 & document[b, q] == document[b, k]", (RESET,), score=SDPA),
    Case(
        positions_of_other_documents,
        "positions[b, k] <= positions[b, q] & document[b, q] == document[b, k]",
        (RESET,),
        score=SDPA,
    ),
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
