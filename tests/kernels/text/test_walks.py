"""Which tiles generated kernels visit and which of them they test, beside what the predicate says of each pair."""

from __future__ import annotations

import pytest
import torch
from plans import CASES, Sizes
from walking import Visits, visits

from effattn.lowering.kernels.generate import generate
from effattn.lowering.kernels.spec import KernelSpec, Tiles

BANDS = (
    *("none", "causal", "causal_from_the_end", "window", "wide_window", "two_sided_window", "chunked", "documents"),
    *("lengths_per_batch", "left_padding", "right_padding", "holes", "empty_rows_mean"),
    *("window_and_sinks", "wide_window_and_sinks"),
)
OVER_A_MAP = ("documents", "left_padding", "right_padding", "holes", "empty_rows_mean")  # but for decode
LISTS = (
    *("power_16", "power_32_no_sinks", "power_32_few_sinks", "power_at_an_offset", "power_at_a_known_offset"),
    *("power_two_sided", "list_alone"),
)
# how many tiles of a row of tiles may be visited, or tested, for nothing
SPARE = {
    # the first key and the last are bounds of their own: a tile may lie between them, and be empty
    **dict.fromkeys(("empty_rows_mean", "left_padding", "holes"), 1),
    "lengths_per_batch": 1,  # backward: keys that no row sees meet the last rows
    "wide_window_and_sinks": 1,  # where the sinks end within the window
    **dict.fromkeys(
        ("power_16", "power_at_an_offset", "power_at_a_known_offset", "power_two_sided", "list_alone"), 1
    ),  # the last of the sinks
    "power_32_few_sinks": 2,  # and where the near band begins, within a block
}


def visits_of(name: str, kind: str, kernel: str = "forward", q_len: int = 90, tiles=(16, 16), change=("", "")):
    """With ``change``, of a kernel in which one text is replaced by another."""
    sizes = Sizes(batch=2, heads=1, kv_heads=1, q_len=q_len, k_len=101)
    call = CASES["left_padding" if name == "holes" else name](sizes, torch.device("cpu"))
    if name == "holes":
        call.captures[0][:, 50] = False
    made = KernelSpec(kind, call.plan.form, call.plan.spec, "float32", 16, 16, 1, Tiles(*tiles, 4, 1))
    source = generate(made)
    assert change[0] in source
    return visits(source.replace(*change) if change[0] else source, made, call, sizes, kernel)


def right(found: list[Visits], spare: int) -> bool:
    return not any(one.wrong for one in found) and max(one.vain + one.tested_in_vain for one in found) <= spare


@pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (16, 32)], ids=str)
@pytest.mark.parametrize("name", [name for name in (*BANDS, *LISTS) if name not in OVER_A_MAP])
def test_tiles_of_keys(name, tiles):
    exact = name in BANDS or tiles == (16, 16)  # the blocks of a list are whole tiles
    assert right(visits_of(name, "prefill", tiles=tiles), SPARE.get(name, 0) if exact else 99)


@pytest.mark.parametrize("name", [*BANDS, *LISTS])
def test_tiles_of_keys_in_decode(name):
    """Split over programs; everything is tested."""
    found = visits_of(name, "decode", q_len=1)
    assert not any(one.wrong or one.vain or one.whole.any() for one in found)


@pytest.mark.parametrize("kernel", ["grad_query", "grad_key_value"])
@pytest.mark.parametrize("name", [name for name in BANDS if name not in OVER_A_MAP])
def test_tiles_in_the_backward(name, kernel):
    assert right(visits_of(name, "backward", kernel, 101, (32, 16)), SPARE.get(name, 0))


@pytest.mark.parametrize(
    ("name", "kind", "kernel", "change"),
    [
        ("causal", "prefill", "forward", ("1 + last_row", "last_row - 15")),  # the last tile is left out
        ("causal", "prefill", "forward", ("1 + last_row", "17 + last_row")),  # one more than needed
        ("causal", "prefill", "forward", ("1 + first_row", "1 + last_row")),  # the last tile is not tested
        ("causal", "prefill", "forward", ("1 + first_row", "first_row - 15")),  # one more is tested
        ("causal", "prefill", "forward", ("outer_tile = 0", "outer_tile = 1")),  # the first tile is left out
        ("window", "prefill", "forward", ("some_first // BLOCK_N", "0")),
        ("wide_window", "prefill", "forward", ("tl.cdiv(every_first, BLOCK_N)", "every_first // BLOCK_N")),
        ("power_16", "prefill", "forward", ("near_right_turn + near_end - near_full_end", "near_right_turn")),
        ("power_16", "prefill", "forward", ("(1 << (place // TILES))", "(1 << (place // TILES + 1))")),
        ("causal", "decode", "forward", ("turns * (split + 1) // splits", "turns * split // splits + 1")),
        ("causal", "backward", "grad_query", ("1 + first_row", "1 + last_row")),
        ("causal", "backward", "grad_key_value", ("(last_key < 1 + middle)", "(first_key < 1 + middle)")),
        ("window", "backward", "grad_key_value", ("tl.cdiv(rows_end, BLOCK_N)", "rows_end // BLOCK_N")),
    ],
)
def test_a_wrong_walk_is_noticed(name, kind, kernel, change):
    q_len = 1 if kind == "decode" else 101
    assert not right(visits_of(name, kind, kernel, q_len, change=change), SPARE.get(name, 0))
