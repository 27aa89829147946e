"""Masks of whole numbers: what arithmetic of 64, 32, 16 and 8 bits makes of large factors, and floats of large numbers.

Rows of the table in ``masks.py``. numpy's arrays wrap around where torch's tensors do.
"""

from __future__ import annotations

import numpy as np
import torch

from tests.fuzz.tables.mask import Mask

FAR = 2**24  # the first number whose successor float32 does not hold


def _int32(x):
    return x.astype(np.int32)


def _int16(x):
    return x.astype(np.int16)


INTEGERS: dict[str, Mask] = {
    "int64: large factor": Mask(
        lambda i, j, given: (i * 50_000_017 + j * 7) % 97 < 60,
        lambda b, h, i, j, given, n: (i * 50_000_017 + j * 7) % 97 < 60,
        rows_may_be_empty=True,
    ),
    "int64: beyond 32 bits": Mask(
        lambda i, j, given: (i * 3_000_000_019) // 7 % 5 != (j * 2_000_000_011) % 3,
        lambda b, h, i, j, given, n: (i * 3_000_000_019) // 7 % 5 != (j * 2_000_000_011) % 3,
        rows_may_be_empty=True,
    ),
    "int64: product": Mask(
        lambda i, j, given: ((i + 70_000) * (j + 70_000)) % 11 < 7,
        lambda b, h, i, j, given, n: ((i + 70_000) * (j + 70_000)) % 11 < 7,
        rows_may_be_empty=True,
    ),
    "int64: of ids and positions": Mask(
        lambda i, j, given: (given["int32 ids"][:, None, None] * j * 100_000_007) % 13 < 9,
        lambda b, h, i, j, given, n: (given["int32 ids"][b, j].astype(np.int64) * j * 100_000_007) % 13 < 9,
        ("int32 ids",), rows_may_be_empty=True,
    ),
    "int64: hashes": Mask(
        lambda i, j, given: (given["hashes"][:, :, None] == given["hashes"][:, None])[:, None],
        lambda b, h, i, j, given, n: given["hashes"][b, i] == given["hashes"][b, j],
        ("hashes",), square=True,
    ),
    "int64: hashes from a number on": Mask(
        lambda i, j, given: (given["hashes"][:, None, None] >= 2**32) & (j <= i),
        lambda b, h, i, j, given, n: (given["hashes"][b, j] >= 2**32) & (j <= i),
        ("hashes",), square=True, rows_may_be_empty=True,
    ),
    "int64: nanoseconds": Mask(
        lambda i, j, given: (given["times"][:, :, None] - given["times"][:, None] < 3_000_000_000)[:, None] & (j <= i),
        lambda b, h, i, j, given, n: (given["times"][b, i] - given["times"][b, j] < 3_000_000_000) & (j <= i),
        ("times",), square=True,
    ),
    "int32: wraps around": Mask(
        lambda i, j, given: (i.int() * 400_000_007 + j.int() * 3) % 97 < 60,
        lambda b, h, i, j, given, n: (_int32(i) * np.int32(400_000_007) + _int32(j) * np.int32(3)) % 97 < 60,
        rows_may_be_empty=True,
    ),
    "int32: ids wrap around": Mask(
        lambda i, j, given: (given["int32 ids"][:, None, None] * 500_000_009) % 13 < 9,
        lambda b, h, i, j, given, n: (given["int32 ids"][b, j] * np.int32(500_000_009)) % 13 < 9,
        ("int32 ids",), rows_may_be_empty=True,
    ),
    "int32: ids and positions": Mask(
        lambda i, j, given: (given["int32 ids"][:, None, None] * (j.int() + 1) * 20_000_003) % 13 < 9,
        lambda b, h, i, j, given, n: (given["int32 ids"][b, j] * _int32(j + 1) * np.int32(20_000_003)) % 13 < 9,
        ("int32 ids",), rows_may_be_empty=True,
    ),
    "int32: cast at the end": Mask(
        lambda i, j, given: ((i + 3) * 1_000_000_007 + j).to(torch.int32) % 7 < 5,
        lambda b, h, i, j, given, n: _int32((i + 3) * 1_000_000_007 + j) % 7 < 5,
        rows_may_be_empty=True,
    ),
    "int16: wraps around": Mask(
        lambda i, j, given: i.short() * 5000 - j.short() * 5000 < 9000,
        lambda b, h, i, j, given, n: _int16(i) * np.int16(5000) - _int16(j) * np.int16(5000) < 9000,
        rows_may_be_empty=True,
    ),
    "int8: ids wrap around": Mask(
        lambda i, j, given: (given["int8 ids"][:, :, None] - given["int8 ids"][:, None] < 90)[:, None],
        lambda b, h, i, j, given, n: given["int8 ids"][b, i] - given["int8 ids"][b, j] < 90,
        ("int8 ids",), square=True, only_values_tell=True,
    ),
    "shifted": Mask(
        lambda i, j, given: (i >> 1) == (j >> 1), lambda b, h, i, j, given, n: i // 2 == j // 2,
        rows_may_be_empty=True,
    ),
    "floats beyond 2**24": Mask(
        lambda i, j, given: (i + FAR).float() >= (j + FAR).float(),
        lambda b, h, i, j, given, n: (i + FAR).astype(np.float32) >= (j + FAR).astype(np.float32),
        only_values_tell=True,
    ),
    "negative, divided": Mask(
        lambda i, j, given: (i - j - 9) // 4 % 3 != 0,
        lambda b, h, i, j, given, n: (i - j - 9) // 4 % 3 != 0,
        rows_may_be_empty=True,
    ),
}  # fmt: skip
