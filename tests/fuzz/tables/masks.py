"""Masks: how people spell them in torch, beside what each one means, said in numpy. Whole numbers: ``integers.py``.

Nothing is shared between the two sides: ``make`` is traced with the attention, ``oracle`` is what the predicate that
the backend reads is held against.
"""

from __future__ import annotations

import torch

from tests.fuzz.tables.integers import INTEGERS
from tests.fuzz.tables.mask import Mask

LONGEST = 96  # side of the square buffers


def _range(start, end, like):
    return torch.arange(start, end, device=like.device)


def _triangle(i, j, given):
    return torch.ones(i.shape[0], j.shape[1], device=i.device).tril() > 0


def _beyond(i, j, given):
    return ~torch.triu(torch.ones(i.shape[0], j.shape[1], device=i.device, dtype=torch.bool), diagonal=1)


def _offset(i, j):
    return j.shape[1] - i.shape[0]


def _packed(i, j, given):
    """Positions that start again where a document does, as transformers reads them."""
    starts = (torch.diff(given["positions"], prepend=given["positions"][:, :1] - 1) != 1).cumsum(-1)
    return (starts[:, :, None] == starts[:, None, :])[:, None] & (j <= i)


def _compared(i, j, given):
    """The same with positions for indices, and a window of them."""
    places, starts = given["positions"], _packed(i, j, given)
    i, j = places[:, None, :, None], places[:, None, None, :]
    return starts & (j <= i) & (i - j < 6)


def _cumulated(i, j, given):
    """Documents by where they start: a row of zeros and ones."""
    number = given["starts"].cumsum(-1)
    return (number[:, None, :, None] == number[:, None, None, :]) & (j <= i)


def _gathered(i, j, given):
    batch = torch.arange(given["padding"].shape[0], device=i.device)[:, None, None, None]
    return given["padding"][batch, j]


def _causal(b, h, i, j, given, n):
    return j <= i


def _last(b, h, i, j, given, n):
    return j <= i + n[1] - n[0]


MASKS: dict[str, Mask] = {
    "none": Mask(lambda i, j, given: None, lambda b, h, i, j, given, n: j >= 0),
    # causal
    "causal: comparison": Mask(lambda i, j, given: j <= i, _causal),
    "causal: difference": Mask(lambda i, j, given: ~(j - i > 0), _causal),
    "causal: strict": Mask(lambda i, j, given: (i + 1 > j)[None, None], _causal),
    "causal: tril": Mask(_triangle, _causal),
    "causal: triu": Mask(_beyond, _causal),
    "causal: tril of bool": Mask(
        lambda i, j, given: torch.tril(torch.ones((i.shape[0], j.shape[1]), dtype=torch.bool, device=i.device)), _causal
    ),
    "causal: two ranges": Mask(
        lambda i, j, given: _range(0, j.shape[1], i)[None, :] < _range(1, i.shape[0] + 1, i)[:, None], _causal
    ),
    "causal: buffer": Mask(
        lambda i, j, given: given["triangle"][:, :, _offset(i, j) : j.shape[1], : j.shape[1]],
        _last, ("triangle",), at_most=True,
    ),
    "causal: float buffer": Mask(
        lambda i, j, given: given["float triangle"][: i.shape[0], : j.shape[1]] == 1, _causal, ("float triangle",)
    ),
    "causal: byte buffer": Mask(
        lambda i, j, given: given["byte triangle"][: i.shape[0], : j.shape[1]] != 0, _causal, ("byte triangle",)
    ),
    "causal: to the last": Mask(lambda i, j, given: j <= i + _offset(i, j), _last, rows_may_be_empty=True),
    "causal: last rows": Mask(
        lambda i, j, given: j <= _range(j.shape[1] - i.shape[0], j.shape[1], i)[:, None], _last, at_most=True
    ),
    "causal: tril of offset": Mask(
        lambda i, j, given: torch.ones(i.shape[0], j.shape[1], dtype=torch.bool, device=i.device).tril(_offset(i, j)),
        _last, rows_may_be_empty=True,
    ),
    "causal: positions": Mask(
        lambda i, j, given: (given["places"][:, None, :] <= given["places"][:, -i.shape[0] :, None])[:, None],
        lambda b, h, i, j, given, n: given["places"][b, j] <= given["places"][b, i + n[1] - n[0]],
        ("places",), at_most=True,
    ),
    "causal: cache length": Mask(
        lambda i, j, given: j <= i + given["past"],
        lambda b, h, i, j, given, n: j <= i + given["past"],
        ("past",),
    ),
    # windows, blocks, sinks
    "window": Mask(
        lambda i, j, given: (j <= i) & (i - j < 4), lambda b, h, i, j, given, n: (j <= i) & (i - 4 < j),
        rows_may_be_empty=True,
    ),
    "window: last rows": Mask(
        lambda i, j, given: (j <= i + _offset(i, j)) & (j > i + _offset(i, j) - 5),
        lambda b, h, i, j, given, n: (j <= i + n[1] - n[0]) & (j > i + n[1] - n[0] - 5),
        at_most=True,
    ),
    "window: triangles": Mask(
        lambda i, j, given: torch.ones(i.shape[0], j.shape[1], device=i.device).tril().triu(-3).bool(),
        lambda b, h, i, j, given, n: (j <= i) & (j - i >= -3),
        rows_may_be_empty=True,
    ),
    "window: xor of triangles": Mask(
        lambda i, j, given: (j <= i) ^ (j <= i - 6), lambda b, h, i, j, given, n: (j <= i) & (j > i - 6),
        rows_may_be_empty=True,
    ),
    "window: both sides": Mask(
        lambda i, j, given: (i - j).abs() <= 3, lambda b, h, i, j, given, n: (i - j <= 3) & (j - i <= 3),
        rows_may_be_empty=True,
    ),
    "window: of data": Mask(
        lambda i, j, given: (j <= i) & (i - j < given["past"] + 2),
        lambda b, h, i, j, given, n: (j <= i) & (i - j < given["past"] + 2),
        ("past",), rows_may_be_empty=True,
    ),
    "sinks and window": Mask(
        lambda i, j, given: (j <= i) & ((j < 2) | (i - j < 5)),
        lambda b, h, i, j, given, n: (j <= i) & ((j < 2) | (i - j < 5)),
    ),
    "prefix": Mask(lambda i, j, given: (j <= i) | (j < 3), lambda b, h, i, j, given, n: (j <= i) | (j < 3)),
    "prefix of data": Mask(
        lambda i, j, given: (j <= i) | (j < given["lengths"][:, None, None, None]),
        lambda b, h, i, j, given, n: (j <= i) | (j < given["lengths"][b]),
        ("lengths",),
    ),
    "blocks": Mask(lambda i, j, given: i // 4 == j // 4, lambda b, h, i, j, given, n: i // 4 == j // 4,
                   rows_may_be_empty=True),
    "blocks: causal": Mask(
        lambda i, j, given: (torch.div(j, 4, rounding_mode="floor") == i // 4) & (j <= i),
        lambda b, h, i, j, given, n: (i // 4 == j // 4) & (j <= i),
        rows_may_be_empty=True,
    ),
    "blocks: before": Mask(lambda i, j, given: j // 4 <= i // 4, lambda b, h, i, j, given, n: j // 4 <= i // 4),
    "blocks: neighbours": Mask(
        lambda i, j, given: (i // 3 - j // 3).abs() <= 1,
        lambda b, h, i, j, given, n: (i // 3 - j // 3 <= 1) & (j // 3 - i // 3 <= 1),
        rows_may_be_empty=True,
    ),
    "grid": Mask(
        lambda i, j, given: ((i // 5 - j // 5).abs() <= 1) & ((i % 5 - j % 5).abs() <= 1),
        lambda b, h, i, j, given, n: (abs(i // 5 - j // 5) <= 1) & (abs(i % 5 - j % 5) <= 1),
        rows_may_be_empty=True,
    ),
    "dilated": Mask(
        lambda i, j, given: (j <= i) & ((i - j) % 2 == 0), lambda b, h, i, j, given, n: (j <= i) & ((i + j) % 2 == 0),
        rows_may_be_empty=True,
    ),
    "strided": Mask(
        lambda i, j, given: (j <= i) & ((i - j < 3) | (j % 4 == 3)),
        lambda b, h, i, j, given, n: (j <= i) & ((i - j < 3) | (j % 4 == 3)),
        rows_may_be_empty=True,
    ),
    # padding
    "padding": Mask(
        lambda i, j, given: given["padding"][:, None, None, :],
        lambda b, h, i, j, given, n: given["padding"][b, j],
        ("padding",), rows_may_be_empty=True,
    ),
    "padding: whole numbers": Mask(
        lambda i, j, given: given["numbers"][:, None, None, :] != 0,
        lambda b, h, i, j, given, n: given["numbers"][b, j] == 1,
        ("numbers",), rows_may_be_empty=True,
    ),
    "padding: cast": Mask(
        lambda i, j, given: given["numbers"].unsqueeze(1).unsqueeze(2).to(torch.bool),
        lambda b, h, i, j, given, n: given["numbers"][b, j] == 1,
        ("numbers",), rows_may_be_empty=True,
    ),
    "padding: floats": Mask(
        lambda i, j, given: (1.0 - given["numbers"][:, None, None, :].float()) < 0.5,
        lambda b, h, i, j, given, n: given["numbers"][b, j] == 1,
        ("numbers",), rows_may_be_empty=True,
    ),
    "padding: gathered": Mask(
        _gathered, lambda b, h, i, j, given, n: given["padding"][b, j], ("padding",), rows_may_be_empty=True
    ),
    "padding: lengths": Mask(
        lambda i, j, given: (j[None] < given["lengths"][:, None, None])[:, None],
        lambda b, h, i, j, given, n: j < given["lengths"][b],
        ("lengths",),
    ),
    "padding: on the left": Mask(
        lambda i, j, given: (j[None] >= given["left"][:, None, None])[:, None],
        lambda b, h, i, j, given, n: j >= given["left"][b],
        ("left",), rows_may_be_empty=True,
    ),
    "padding: of both": Mask(
        lambda i, j, given: (given["row padding"][:, :, None] & given["padding"][:, None, :])[:, None],
        lambda b, h, i, j, given, n: given["row padding"][b, i] & given["padding"][b, j],
        ("padding", "row padding"), rows_may_be_empty=True,
    ),
    "causal and padding": Mask(
        lambda i, j, given: (j <= i)[None, None] & given["padding"][:, None, None],
        lambda b, h, i, j, given, n: (j <= i) & given["padding"][b, j],
        ("padding",), rows_may_be_empty=True,
    ),
    "causal and padding: product": Mask(
        lambda i, j, given: (
            torch.ones(i.shape[0], j.shape[1], device=i.device).tril() * given["numbers"][:, None, None] > 0
        ),
        lambda b, h, i, j, given, n: (j <= i) & (given["numbers"][b, j] == 1),
        ("numbers",), rows_may_be_empty=True,
    ),
    "window and padding": Mask(
        lambda i, j, given: torch.logical_and((j <= i) & (i - j < 6), given["padding"][:, None, None]),
        lambda b, h, i, j, given, n: (j <= i) & (i - j < 6) & given["padding"][b, j],
        ("padding",), rows_may_be_empty=True,
    ),
    # documents
    "documents": Mask(
        lambda i, j, given: (given["ids"][:, :, None] == given["ids"][:, None, :])[:, None],
        lambda b, h, i, j, given, n: given["ids"][b, i] == given["ids"][b, j],
        ("ids",), square=True,
    ),
    "documents: causal": Mask(
        lambda i, j, given: (given["ids"][:, None, :, None] == given["ids"][:, None, None]) & (j <= i),
        lambda b, h, i, j, given, n: (given["ids"][b, i] == given["ids"][b, j]) & (j <= i),
        ("ids",), square=True,
    ),
    "documents: packed positions": Mask(
        _packed, lambda b, h, i, j, given, n: (given["ids"][b, i] == given["ids"][b, j]) & (j <= i),
        ("positions", "ids"), square=True,
    ),
    "documents: positions compared": Mask(
        _compared,
        lambda b, h, i, j, given, n: (given["ids"][b, i] == given["ids"][b, j]) & (j <= i) & (i - j < 6),
        ("positions", "ids"), square=True,
    ),
    "documents: starts": Mask(
        _cumulated, lambda b, h, i, j, given, n: (given["ids"][b, i] == given["ids"][b, j]) & (j <= i),
        ("starts", "ids"), square=True,
    ),
    "documents: without padding": Mask(
        lambda i, j, given: (
            (given["ids"][:, :, None] == given["ids"][:, None, :]) & given["padding"][:, None, :]
        )[:, None],
        lambda b, h, i, j, given, n: (given["ids"][b, i] == given["ids"][b, j]) & given["padding"][b, j],
        ("ids", "padding"), square=True, rows_may_be_empty=True,
    ),
    # arithmetic that is easily read wrongly
    "remainder of a negative": Mask(
        lambda i, j, given: ((i - j) % 3 == 0) | (i == j), lambda b, h, i, j, given, n: (i + 2 * j) % 3 == 0,
        rows_may_be_empty=True,
    ),
    "floor of a negative": Mask(
        lambda i, j, given: (i - j) // 3 == 0, lambda b, h, i, j, given, n: (i - j >= 0) & (i - j <= 2),
        rows_may_be_empty=True,
    ),
    "truncated": Mask(
        lambda i, j, given: torch.div(i - j, 3, rounding_mode="trunc") == 0,
        lambda b, h, i, j, given, n: (i - j >= -2) & (i - j <= 2),
        rows_may_be_empty=True,
    ),
    "bytes that wrap around": Mask(
        lambda i, j, given: i.to(torch.uint8) - j.to(torch.uint8) <= 4,
        lambda b, h, i, j, given, n: (i - j >= 0) & (i - j <= 4),
        rows_may_be_empty=True,
    ),
    "sum of booleans": Mask(
        lambda i, j, given: (j <= i - 2) + (j == i) + (j == 0),
        lambda b, h, i, j, given, n: (j <= i) & (j != i - 1) | (j == 0),
    ),
    "product of booleans": Mask(
        lambda i, j, given: (j <= i) * (j != i - 2), lambda b, h, i, j, given, n: (j <= i) & (j + 2 != i),
        rows_may_be_empty=True,
    ),
    "counted conditions": Mask(
        lambda i, j, given: (j <= i).int() + (j >= 2).int() >= 1,
        lambda b, h, i, j, given, n: (j <= i) | (j >= 2),
        rows_may_be_empty=True,
    ),
    "complement in floats": Mask(
        lambda i, j, given: (1.0 - (j <= i).float()) == 0.0, _causal,
    ),
    "not itself": Mask(
        lambda i, j, given: i != j, lambda b, h, i, j, given, n: (i < j) | (i > j), rows_may_be_empty=True
    ),
    "itself and the first": Mask(
        lambda i, j, given: torch.eye(i.shape[0], j.shape[1], dtype=torch.bool, device=i.device) | (j == 0),
        lambda b, h, i, j, given, n: (i == j) | (j == 0),
    ),
    "flipped triangle": Mask(
        lambda i, j, given: torch.ones(i.shape[0], j.shape[1], dtype=torch.bool, device=i.device).triu().flip(-1),
        lambda b, h, i, j, given, n: i <= n[1] - 1 - j,
        rows_may_be_empty=True,
    ),
    "rounded distance": Mask(
        lambda i, j, given: ((i - j) / 4).round() == 0,
        lambda b, h, i, j, given, n: (i - j >= -2) & (i - j <= 2),
        rows_may_be_empty=True,
    ),
    "float distance": Mask(
        lambda i, j, given: (i.float() - j.float()).abs() * 0.5 <= 1.5,
        lambda b, h, i, j, given, n: (i - j >= -3) & (i - j <= 3),
        rows_may_be_empty=True,
    ),
    "cut into pieces": Mask(
        lambda i, j, given: torch.cat([torch.ones_like(j[:, :2]), j[:, 2:] % 2], dim=-1) + 0 * i > 0,
        lambda b, h, i, j, given, n: (j < 2) | (j % 2 == 1),
    ),
    "selected": Mask(
        lambda i, j, given: torch.where(i % 2 == 0, j <= i, j >= i),
        lambda b, h, i, j, given, n: ((i % 2 == 0) & (j <= i)) | ((i % 2 == 1) & (j >= i)),
        rows_may_be_empty=True,
    ),
    "largest": Mask(
        lambda i, j, given: torch.maximum(j - i, i - j * 2) <= 0,
        lambda b, h, i, j, given, n: (j <= i) & (i <= 2 * j),
        rows_may_be_empty=True,
    ),
    # of the caller, with a value for every pair
    "given [B, 1, N, N]": Mask(
        lambda i, j, given: given["pairs"], lambda b, h, i, j, given, n: given["pairs"][b, 0, i, j],
        ("pairs",), rows_may_be_empty=True,
    ),
    "given [N, N]": Mask(
        lambda i, j, given: given["plane"], lambda b, h, i, j, given, n: given["plane"][i, j],
        ("plane",), rows_may_be_empty=True,
    ),
    "given [B, H, N, N]": Mask(
        lambda i, j, given: given["all pairs"], lambda b, h, i, j, given, n: given["all pairs"][b, h, i, j],
        ("all pairs",), rows_may_be_empty=True,
    ),
    "given, causal": Mask(
        lambda i, j, given: given["pairs"] & (j <= i),
        lambda b, h, i, j, given, n: given["pairs"][b, 0, i, j] & (j <= i),
        ("pairs",), rows_may_be_empty=True,
    ),
    "given, swapped": Mask(
        lambda i, j, given: given["plane"].t().contiguous().t(), lambda b, h, i, j, given, n: given["plane"][i, j],
        ("plane",), rows_may_be_empty=True,
    ),
    # of heads and rows
    "heads": Mask(
        lambda i, j, given: (j <= i) & (given["wide heads"][None, :, None, None] | (i - j < 3)),
        lambda b, h, i, j, given, n: (j <= i) & (given["wide heads"][h] | (i - j < 3)),
        ("wide heads",), rows_may_be_empty=True,
    ),
    "rows": Mask(
        lambda i, j, given: (j <= i) | given["row padding"][:, None, :, None],
        lambda b, h, i, j, given, n: (j <= i) | given["row padding"][b, i],
        ("row padding",),
    ),
    "of the query's data": Mask(
        lambda i, j, given: (j <= i) | (given["row values"] > 0)[:, None, :, None],
        lambda b, h, i, j, given, n: (j <= i) | (given["row values"][b, i] > 0),
        ("row values",),
    ),
    **INTEGERS,
}  # fmt: skip
