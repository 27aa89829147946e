"""Tables of decay against their rate: what rounding allows, and what it does not."""

from __future__ import annotations

import pytest
import torch

import effattn.runtime.ops.linear  # noqa: F401  (the namespace of ops)
from effattn.errors import DecayChanged
from effattn.runtime.ops.decay_tables import checked_decay, follow

SLOPES = torch.tensor([0.9, 0.13, 3e-6])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(size=64, dtype=torch.float32, slopes=SLOPES):
    place = torch.arange(size)
    distance = place[:, None] - place
    rising = torch.exp(-slopes[:, None] * (place + 1))
    falling = torch.exp(-slopes[:, None] * (size - 1 - place))[..., None]
    triangle = torch.exp(-slopes[:, None, None] * distance.clamp(min=0)).tril()[None]
    return -slopes.to(dtype).float(), [rising.to(dtype)], [falling.to(dtype)], [triangle.to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 256])
def test_rounded_powers_are_powers(dtype, size):
    given = tables(size, dtype)
    assert torch.equal(checked_decay(*given), given[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [1, 2, 3])
def test_one_other_number_is_seen(which, dtype):
    given = tables(dtype=dtype)
    (table,) = given[which]
    for head, age in ((0, 0), (1, 7), (2, 63)):  # a rounded rate moves what is older by more
        place = (0, head, age, 0) if which == 3 else (head, 63 - age) if which == 2 else (head, age)
        changed = table.clone()
        changed[place] *= 1 + 8 * torch.finfo(dtype).eps
        assert not follow(given[0], *([changed] if n == which else given[n] for n in (1, 2, 3)))


def test_what_else_is_no_decay():
    log_decay, rising, falling, triangles = tables()
    for place, value in (((0, 1, 3, 4), 1e-30), ((0, 1, 9, 2), torch.nan)):
        changed = triangles[0].clone()
        changed[place] = value
        assert not follow(log_decay, [], [], [changed])
    growing = tables(slopes=-SLOPES / 100)
    assert not follow(*growing)
    with pytest.raises(DecayChanged, match=r"torch\._dynamo\.reset"):
        checked_decay(log_decay * 1.01, rising, falling, triangles)
    assert not follow(log_decay, falling, rising, triangles)


def test_op():
    torch.library.opcheck(torch.ops.effattn.checked_decay.default, tables(5))
