"""What generated kernels load and test, and how they compute places. Numbers are tested elsewhere; here is what they
do not show."""

from __future__ import annotations

import linear_specs
import pytest
from reading import Kernel, calls
from specs import compiled, listed, spec

from effattn.lowering.kernels.generate import generate
from effattn.lowering.kernels.linear import source as linear_source
from effattn.lowering.kernels.linear.spec import LinearSpec
from effattn.lowering.kernels.parameters import LISTS, kernel_constants
from effattn.lowering.kernels.selection import block_map, pick, score
from effattn.lowering.kernels.selection.block_map import MapSpec
from effattn.lowering.kernels.selection.score import ScoreSpec
from effattn.lowering.kernels.spec import KernelSpec, Tiles


def source_of(one: KernelSpec | ScoreSpec | LinearSpec | MapSpec | int) -> str:
    if isinstance(one, int):
        return pick.generate(one, pick.warps_for(one))
    makers = {
        KernelSpec: generate,
        ScoreSpec: score.generate,
        LinearSpec: linear_source.generate,
        MapSpec: block_map.generate,
    }
    return makers[type(one)](one)


# -- what each loop loads and tests ----------------------------------------------------------------------------------

SPECS = {
    "causal": spec("causal", "sm90"),
    "padding": spec("left_padding", "sm90"),
    "documents": spec("documents", "sm90"),
    "power": spec("power_128", "sm90"),
    "mean": spec("empty_rows_mean", "sm80", dim=96, value_dim=64, groups=1),
    "proxy": listed("sm90", "proxy"),
    "tokens": listed("sm90", "dhsa", unit=1),
    "decode": spec("left_padding", "sm90", "decode"),
    "causal backward": spec("causal", "sm90", "backward"),
    "padding backward": spec("left_padding", "sm90", "backward"),
    "alibi backward": spec("alibi", "sm90", "backward", dim=80),
    "lightning": linear_specs.spec("sm90", decay=True),
    "reverse": linear_specs.spec("sm80", features=60, value_dim=96, ones=True, reverse=True),
    "whole": linear_specs.spec("sm90", "whole", features=64, value_dim=64, ones=True, key_groups=4, shared=True),
    "step": linear_specs.spec("sm90", "step", decay=True),
}
EVERYTHING = "key_ok keys rows"
# (specification, kernel) -> for each loop what it loads, under which mask, and what decides about its scores
LOOPS: dict[tuple[str, str], list[tuple[dict[str, str], str]]] = {
    ("causal", "forward"): [
        ({"key": "", "value": ""}, ""),
        ({"key": "key_ok", "value": "key_ok"}, EVERYTHING),
    ],
    ("decode", "find_allowed"): [({"data_padding": "key_ok"}, "")],
    ("padding", "forward"): [  # over a block map: what is not tested does not read the data either
        (
            {"kv_indices": "", "key": "key_ok", "data_padding": "key_ok", "value": "key_ok"},
            f"data_padding {EVERYTHING}",
        ),
        ({"kv_indices": "", "key": "", "value": ""}, ""),
    ],
    ("documents", "forward"): [
        (
            {"kv_indices": "", "key": "key_ok", "data_document": "key_ok", "value": "key_ok"},
            f"data_document {EVERYTHING}",
        ),
        ({"kv_indices": "", "key": "", "value": ""}, ""),
    ],
    ("power", "forward"): [
        ({"key": "", "value": ""}, ""),
        ({"key": "key_ok", "value": "key_ok"}, "first_row key_ok keys rows"),
    ],
    ("mean", "forward"): [
        ({"key": "dim_ok", "value": ""}, ""),
        ({"key": "dim_ok key_ok", "value": "key_ok"}, EVERYTHING),
        ({"value": "k_len keys"}, ""),  # the mean of all values, for rows that may see none
    ],
    ("proxy", "forward"): [
        ({"kv_indices": "", "key": "key_ok", "value": "key_ok"}, EVERYTHING),
        ({"kv_indices": "", "key": "", "value": ""}, ""),
    ],
    ("tokens", "forward"): [
        ({"kv_indices": "key_ok", "key": "key_ok", "value": "key_ok"}, EVERYTHING),
        ({"kv_indices": "key_ok", "key": "key_ok", "value": "key_ok"}, "key_ok"),
    ],
    ("decode", "forward"): [
        ({"key": "key_ok", "data_padding": "key_ok", "value": "key_ok"}, f"data_padding {EVERYTHING}"),
    ],
    ("decode", "combine"): [({"parts": "splits"}, "")],
    ("causal backward", "prepare"): [],
    ("causal backward", "grad_query"): [
        ({"key": "", "value": ""}, ""),
        ({"key": "key_ok", "value": "key_ok"}, EVERYTHING),
    ],
    ("causal backward", "grad_key_value"): [
        ({"query": "", "grad_out": "", "lse": "row_ok", "delta": "row_ok"}, ""),
        ({"query": "row_ok", "grad_out": "row_ok", "lse": "row_ok", "delta": "row_ok"}, "keys rows"),
    ],
    ("padding backward", "grad_query"): [
        ({"kv_indices": "", "key": "", "value": ""}, ""),
        (
            {"kv_indices": "", "key": "key_ok", "value": "key_ok", "data_padding": "key_ok"},
            f"data_padding {EVERYTHING}",
        ),
    ],
    ("padding backward", "grad_key_value"): [  # the padding of the program's own keys is loaded before
        ({"kv_indices": "", "query": "", "grad_out": "", "lse": "row_ok", "delta": "row_ok"}, ""),
        (
            {"kv_indices": "", "query": "row_ok", "grad_out": "row_ok", "lse": "row_ok", "delta": "row_ok"},
            "data_padding keys rows",
        ),
    ],
    ("alibi backward", "grad_key_value"): [  # heads change from turn to turn, and with them the slope
        (
            {
                "query": "dim_ok",
                "grad_out": "value_dim_ok",
                "lse": "row_ok",
                "log_totals": "row_ok",
                "delta": "row_ok",
                "data_slopes": "",
            },
            "",
        ),
        (
            {
                "query": "dim_ok row_ok",
                "grad_out": "row_ok value_dim_ok",
                "lse": "row_ok",
                "log_totals": "row_ok",
                "delta": "row_ok",
                "data_slopes": "",
            },
            "keys row_ok rows",
        ),
    ],
    ("lightning", "partial_states"): [({"key": "", "value": ""}, "")],
    ("lightning", "carry"): [({"states": "ok"}, "")],
    ("lightning", "outputs"): [({"query": "row_ok", "key": "row_ok", "value": "row_ok"}, "")],
    ("reverse", "partial_states"): [({"key": "dim_ok", "value": "value_dim_ok"}, "")],
    ("reverse", "outputs"): [
        ({"query": "dim_ok row_ok", "key": "dim_ok row_ok", "value": "row_ok value_dim_ok"}, "distance")
    ],
    ("whole", "partial_states"): [({"key": "row_ok", "value": "row_ok"}, "")],
    ("whole", "add_up"): [({"states": "ok"}, "")],
    ("whole", "outputs"): [({"query": "row_ok"}, "")],
    ("step", "step"): [({"query": "", "key": "", "value": ""}, "")],
}


@pytest.mark.parametrize(("name", "kernel"), LOOPS)
def test_what_loops_load_and_test(name, kernel):
    assert loops_of(Kernel(source_of(SPECS[name]), kernel)) == LOOPS[name, kernel]


def loops_of(kernel: Kernel) -> list[tuple[dict[str, str], str]]:
    return [(loop.masks(), loop.tested) for loop in kernel.loops]


def test_what_rows_need_is_loaded_once():
    found = Kernel(source_of(SPECS["documents"]))
    before = [call for node in found.own_statements() for call in calls([node], "load")]
    assert [found.tensor(call.args[0]) for call in before] == [
        "query",
        "data_document",
        "kv_num_blocks",
        "partial_blocks",
    ]


@pytest.mark.parametrize("tile", [32, 64])
def test_what_is_one_number_for_all_rows_of_a_tile_is_loaded_once_a_key(tile):
    found = Kernel(generate(spec("blocks_in_a_table", "sm90", tiles=Tiles(tile, 16, 4, 1))))
    places = [loop.leaves(load.call.args[0]) for loop in found.loops for load in loop.loads if "data" in load.tensor]
    assert [("rows" in place, "first_row" in place) for place in places] == [(tile > 32, tile == 32)]


# -- every kernel that is compiled ------------------------------------------------------------------------------------

KERNELS = {
    name.removesuffix(" sm90"): (one, kernel)
    for name, (one, arch, kernel) in {**compiled(), **linear_specs.compiled()}.items()
    if arch == "sm90" and not name.startswith("hopper")
}


@pytest.mark.parametrize("name", KERNELS)
def test_places_in_memory_are_computed_in_64_bits(name):
    one, kernel = KERNELS[name]
    assert not Kernel(source_of(one), kernel).narrow_products()


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_loaded_in_vain(name):
    one, kernel = KERNELS[name]
    assert not Kernel(source_of(one), kernel).needless_loads()


LISTED = {"lists", "counted", "width"} | {f"{name}_stride_{dim}" for name in LISTS for dim in "bh"}
# numbers that change from call to call, beside lengths: how programs are laid out, how long lists are
LAID_OUT = {
    "prefill": {"together"},
    "listed": {"together"},
    "decode": {"splits"},
    "backward": set(),
}


@pytest.mark.parametrize("name", [name for name, (one, _) in KERNELS.items() if isinstance(one, KernelSpec)])
def test_what_kernels_are_specialised_on(name):
    one, kernel = KERNELS[name]
    found = Kernel(source_of(one), kernel)
    lengths = {"heads", "q_len", "k_len"} | {number for number in found.parameters if "_size_" in number}
    masks = {f"{load.name}_stride_0" for load in one.attention.captures if load.ndim == 2}
    lengths |= masks & set(found.parameters)  # their length, from batch to batch
    laid_out = LAID_OUT[one.kind] if kernel == "forward" else set()
    lists = LISTED if one.list_block and kernel != "find_allowed" else set()
    assert set(found.unspecialised) & set(found.parameters) == lengths | laid_out | lists
    assert found.setting("OPTIONS") == {"num_warps": one.tiles.warps, "num_stages": one.tiles.stages}
    if kernel != "find_allowed":
        values = {name: value for name, value in kernel_constants(one).items() if name != "DIRECT"}
        assert dict(zip(found.constants, found.setting("CONSTANTS"), strict=False)) == values


# -- what these tests notice ------------------------------------------------------------------------------------------


def changed(name: str, kernel: str, old: str, new: str) -> Kernel:
    source = source_of(SPECS[name])
    assert old in source
    return Kernel(source.replace(old, new), kernel)


@pytest.mark.parametrize(
    ("name", "kernel", "old", "new"),
    [
        ("causal", "forward", "key_stride_n + key_offsets)", "key_stride_n + key_offsets, mask=key_ok[None, :])"),
        ("causal", "forward", "key_offsets, mask=key_ok[None, :], other=0.0)", "key_offsets)"),
        ("causal", "forward", "(keys[None, :] <= rows[:, None]) & key_ok[None, :]", "key_ok[None, :]"),
        ("causal", "forward", "new_top = ", "scores = tl.where(keys < rows, scores, 0.0)\n        new_top = "),
        ("padding", "forward", "(padding_0 != 0)[None, :] & ", ""),
        ("mean", "forward", "value_offsets)", "value_offsets, mask=value_dim_ok[None, :])"),
        ("proxy", "forward", "tl.load(kv_indices + partial_count + i", "(kv_indices + tl.load(partial_blocks + i)"),
        ("reverse", "outputs", "mask=row_ok[None, :] & dim_ok[:, None]", "mask=row_ok[None, :]"),
        ("reverse", "outputs", "tl.where(distance >= 0, weights, 0.0)", "weights"),
        ("whole", "outputs", "acc = tl.dot(", "acc = tl.load(final) + tl.dot("),
    ],
)
def test_another_load_or_condition_is_noticed(name, kernel, old, new):
    with pytest.raises(AssertionError):
        assert loops_of(changed(name, kernel, old, new)) == LOOPS[name, kernel]


@pytest.mark.parametrize(
    ("name", "kernel", "old"),
    [
        ("causal", "forward", "rows.to(tl.int64)[:, None] * query_stride_n"),
        ("causal", "forward", "start.to(tl.int64) * key_stride_n"),
        ("causal", "forward", "batch.to(tl.int64) * value_stride_b"),
        ("causal", "forward", "pair.to(tl.int64) * q_len"),
        ("padding", "forward", "keys.to(tl.int64) * padding_stride_1"),
        ("tokens", "forward", "keys.to(tl.int64)[None, :] * key_stride_n"),
        ("tokens", "forward", "(tile_row // LIST_BLOCK).to(tl.int64)"),
        ("decode", "forward", "(batch * heads + head).to(tl.int64) * q_len"),
        ("decode", "combine", "split.to(tl.int64) * tl.num_programs(0)"),
        ("causal backward", "grad_key_value", "wide = keys.to(tl.int64)[:, None]"),
        ("lightning", "carry", "(tl.program_id(0) // STATE_TILES).to(tl.int64)"),
        ("lightning", "outputs", "row = (start).to(tl.int64)"),
    ],
)
def test_32_bits_are_noticed(name, kernel, old):
    assert changed(name, kernel, old, old.replace(".to(tl.int64)", "")).narrow_products()


@pytest.mark.parametrize(
    ("name", "kernel", "old", "new"),
    [
        ("causal", "forward", "key_block = ", "unused = tl.load(value + start)\n        key_block = "),
        ("causal", "forward", "key_block = ", "start += tl.load(lse)\n        key_block = "),
        ("mean", "forward", "new_top = ", "scores += tl.load(key + start) + tl.load(key + start)\n        new_top = "),
        ("lightning", "outputs", "weights * within", "weights * within * tl.load(log_decay + head)"),
    ],
)
def test_a_load_in_vain_is_noticed(name, kernel, old, new):
    assert changed(name, kernel, old, new).needless_loads()
