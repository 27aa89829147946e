"""Masks that no formula describes: the kernel visits what a block map lists, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from checking import check, check_gradients
from plans import CAUSAL, Call, Sizes, power_keep, tensors

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import FloorDiv, Modulo, Nk, Table, b, h, k, load, q, s
from effattn.ir.plan import Plan
from effattn.lowering.iteration.tile_ranges import by_formula
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime.selection.block_map import Wanted, block_map
from effattn.runtime.targets import triton as triton_target

SMALL = Tiles(16, 16, 4, 1)
SIZES = Sizes(batch=2, heads=4, kv_heads=2, q_len=90, k_len=90)
PLACES = torch.arange(90)


def of(name: str, *indices):
    return load(name, indices, integer=True)


# name -> rule, captured tensors
MASKS: dict[str, tuple] = {
    "documents": (
        sympy.And(CAUSAL, sympy.Eq(of("document", b, q), of("document", b, k))),
        {"document": torch.stack([PLACES // 37, PLACES // 20])},
    ),
    "documents and padding": (
        sympy.And(CAUSAL, sympy.Eq(of("document", b, q), of("document", b, k)), sympy.Ne(of("padding", b, k), 0)),
        {"document": torch.stack([PLACES // 37, PLACES // 20]), "padding": torch.tensor([[0], [50]]) <= PLACES},
    ),
    "left padding": (
        sympy.And(CAUSAL, sympy.Ne(of("padding", b, k), 0)),
        {"padding": torch.tensor([[60], [5]]) <= PLACES},
    ),
    "heads of two kinds": (
        sympy.And(CAUSAL, sympy.Or(sympy.Ne(of("full", h), 0), q - k < 9)),
        {"full": torch.tensor([True, False, False, True])},
    ),
    "window of each head": (sympy.Abs(q - k) < Table(h, *map(sympy.Integer, (5, 17, 40, 90))), {}),
    "clamped window": (sympy.Abs(sympy.Max(8, sympy.Min(q, Nk - 8)) - k) < 8, {}),
    "blocks": (
        sympy.And(CAUSAL, sympy.Ne(of("kept", h, FloorDiv(q, 32), FloorDiv(k, 32)), 0)),
        {"kept": torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5},
    ),
    "opaque": (
        sympy.Ne(of("mask", b, sympy.Integer(0), q, k), 0),
        {"mask": torch.rand(2, 1, 90, 90, generator=torch.Generator().manual_seed(0)) > 0.98},
    ),
    "undecided": (sympy.And(CAUSAL, sympy.Eq(Modulo(q - k, 3), 0)), {}),
    "nothing": (sympy.And(CAUSAL, of("document", b, k) > 7), {"document": torch.stack([PLACES // 37, PLACES // 20])}),
}


# a bound for each head: what no formula said once is one now
BY_FORMULA = ("heads of two kinds", "window of each head", "clamped window")


def call_of(name: str, empty_rows: str = "zero") -> Call:
    rule, captured = MASKS[name]
    specs = [CaptureSpec(*(each, str(held.dtype).removeprefix("torch."), held.ndim)) for each, held in captured.items()]
    spec = AttentionSpec(SIZES.scale * s, rule, captures=tuple(specs), empty_rows=empty_rows)
    assert by_formula(rule) == (name in BY_FORMULA)
    return Call(Plan("exact", spec), list(captured.values()))


@pytest.mark.parametrize("tiles", [SMALL, Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, tiles):
    check(call_of(name), *tensors(SIZES), config=tiles)


@pytest.mark.parametrize("empty_rows", ["nan", "mean"])
@pytest.mark.parametrize("name", ["nothing", "left padding"])
def test_rows_without_keys(name, empty_rows):
    check(call_of(name, empty_rows), *tensors(SIZES), config=SMALL)


@pytest.mark.parametrize(("q_len", "k_len"), [(17, 17), (33, 64), (90, 90), (40, 23)])
def test_lengths_that_change(q_len, k_len):
    call = call_of("documents and padding")
    check(call, *tensors(replace(SIZES, q_len=q_len, k_len=k_len)), config=SMALL)


def test_data_that_changes_from_call_to_call():
    call = call_of("documents")
    for width in (11, 90, 1):
        call.captures[0].copy_((PLACES // width).expand(2, -1))
        check(call, *tensors(SIZES), config=SMALL)


@pytest.mark.parametrize("name", ["documents", "left padding", "blocks"])
def test_what_is_not_visited_is_not_read(name):
    """What other tiles hold does not matter, not even NaN, which a weight of zero would not remove."""
    call, (query, key, value) = call_of(name), tensors(replace(SIZES, heads=2, kv_heads=2))
    if name == "blocks":
        call.captures[0] = call.captures[0][:2]
    sizes = (2, 2, 90, 90)
    listed = block_map(Wanted(call.plan.spec, sizes, call.captures, [], [], 16, 16, torch.device("cpu")))
    wanted, _ = triton_target.run(call.plan, query, key, value, call.captures, config=SMALL)
    for row in (0, 3, 5):
        seen = listed.rows(row * 16, row * 16 + 1, 2, 90)[:, :, 0].expand(2, 2, -1)
        other_key, other_value = (held.masked_fill(~seen[..., None], torch.nan) for held in (key, value))
        out, _ = triton_target.run(call.plan, query, other_key, other_value, call.captures, config=SMALL)
        rows = slice(row * 16, min(row * 16 + 16, 90))
        torch.testing.assert_close(out[:, :, rows], wanted[:, :, rows], atol=0, rtol=0)


@pytest.mark.parametrize("name", [*MASKS, "power"])
def test_gradients(name):
    if name == "power":
        rule = sympy.And(CAUSAL, power_keep(16, 16, 7))
        call = Call(Plan("power", AttentionSpec(SIZES.scale * s, rule)))
    else:
        call = call_of(name)
    check_gradients(call, tensors(SIZES), config=Tiles(32, 16, 4, 1))


def test_gradients_do_not_read_what_is_not_visited():
    call, inputs = call_of("documents"), tensors(SIZES)
    out, lse = triton_target.run(call.plan, *inputs, call.captures, config=SMALL)
    grad = torch.ones_like(out)

    def grads(*operands):
        return triton_target.run_backward(call.plan, grad, None, *operands, out, lse, call.captures, config=SMALL)

    wanted = grads(*inputs)
    # tile 5 of keys and tile 5 of queries belong to the last document alone
    query, key, value = (tensor.clone() for tensor in inputs)
    key[:, :, 80:], value[:, :, 80:] = torch.nan, torch.nan
    torch.testing.assert_close(grads(query, key, value)[0][:, :, :32], wanted[0][:, :, :32], atol=0, rtol=0)
    query[:, :, 80:] = torch.nan
    for got, want in zip(grads(query, *inputs[1:])[1:], wanted[1:3], strict=False):
        torch.testing.assert_close(got[:, :, :32], want[:, :, :32], atol=0, rtol=0)


def test_documents_visit_the_tiles_of_their_own_document():
    call = call_of("documents")
    found = block_map(Wanted(call.plan.spec, (2, 4, 90, 90), call.captures, [], [], 16, 16, torch.device("cpu")))
    document = call.captures[0]
    for batch in range(2):
        for row in range(6):
            queries = slice(row * 16, min(row * 16 + 16, 90))
            first = int((document[batch] == document[batch, queries][0]).nonzero()[0])
            own = list(range(first // 16, row + 1))
            count, partial = int(found.kv_num_blocks[batch, 0, row]), int(found.partial[batch, 0, row])
            assert sorted(found.kv_indices[batch, 0, row, :count].tolist()) == own
            assert row in found.kv_indices[batch, 0, row, :partial]
