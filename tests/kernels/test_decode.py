"""The kernel for few query rows, its splits and how they are combined, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from checking import check
from plans import BY_HEAD, CASES, Sizes, tensors

from effattn.lowering.kernels.spec import Tiles
from effattn.runtime.targets.triton.specialise import kind_of, splits_for

# a decode tile cannot follow a block list for several rows at once
LISTED = [name for name in CASES if name.startswith(("power", "list"))]


def _decode(name: str, sizes: Sizes, splits: int):
    call = CASES[name](sizes, torch.device("cpu"))
    rows = max(16, 1 << (sizes.q_len * sizes.heads // sizes.kv_heads - 1).bit_length())
    check(call, *tensors(sizes), config=Tiles(rows, 16, 4, 1), kind="decode", splits=splits)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", [name for name in CASES if name not in BY_HEAD])
def test_every_plan_for_one_row(name, splits):
    _decode(name, Sizes(q_len=1, k_len=77), splits)


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*LISTED, *BY_HEAD)])
def test_every_plan_for_several_rows(name):
    _decode(name, Sizes(q_len=5, k_len=45), 2)


@pytest.mark.parametrize("groups", [1, 3, 4, 8])
def test_groups(groups):
    _decode("cache_by_pointer", Sizes(heads=2 * groups, kv_heads=2, q_len=3, k_len=90), 4)


@pytest.mark.parametrize("splits", [1, 2, 33, 64])
def test_more_splits_than_tiles(splits):
    _decode("causal_from_the_end", Sizes(q_len=1, k_len=40, batch=1), splits)


def test_few_rows_are_decoded_and_lists_are_not():
    device = torch.device("cpu")
    causal = CASES["causal_from_the_end"](Sizes(), device).plan
    power = CASES["power_at_an_offset"](Sizes(), device).plan
    by_head = CASES["window_per_head"](Sizes(), device).plan
    assert kind_of(by_head, 1, 8) == "prefill"
    assert kind_of(causal, 1, 8) == "decode"
    assert kind_of(causal, 17, 1) == "prefill"
    assert kind_of(causal, 16, 16) == "prefill"
    assert kind_of(power, 1, 8) == "decode"
    assert kind_of(power, 2, 8) == "prefill"


@pytest.mark.parametrize(("pairs", "k_len", "wanted"), [(8, 131072, 33), (8, 100, 1), (1024, 131072, 1), (1, 4096, 16)])
def test_splits_follow_sizes(pairs, k_len, wanted):
    assert splits_for(pairs, k_len, 132) == wanted
