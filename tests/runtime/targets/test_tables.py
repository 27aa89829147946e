"""Numbers that are known when compiling, one for each head: in expressions, plans, forms and on the portable target."""

from __future__ import annotations

import pytest
import sympy
import torch
from comparing import assert_close
from pydantic import Field

import effattn
from effattn.errors import PlanError
from effattn.ir import wire
from effattn.ir.bounds import UNKNOWN, Interval, interval
from effattn.ir.expr import Nk, Table, h, k, q, s
from effattn.ir.text import text
from effattn.lowering import forms
from effattn.lowering.forms.form import CAUSAL, FROM_THE_START, Form, Params
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.runtime.algebra import evaluate

VALUES = (3, 1, 4, 1, 5)


def test_what_a_table_is():
    assert Table(h, 7, 7) == 7
    assert [Table(sympy.Integer(i), *VALUES) for i in (-2, 0, 2, 4, 9)] == [3, 3, 4, 5, 5]
    assert interval(Table(h, *VALUES) - 2, lambda name: Interval(0, 9), lambda name: UNKNOWN) == (-1, 3)
    assert Table(h, *VALUES).is_integer
    assert not Table(h, 1, 0.5).is_integer
    assert text(q - k < Table(h, 4, 8)) == "q - k < [4, 8][h]"


@pytest.mark.parametrize("values", [(), (s, 1), (sympy.oo, 1), (sympy.nan, 1), tuple(range(300))])
def test_what_is_no_table(values):
    with pytest.raises(ValueError, match="a table holds"):
        Table(h, *values)


@pytest.mark.parametrize("values", [VALUES, (0.5, 1, -0.25), (1, 2)])
def test_values_and_plans(values):
    term, index = Table(h, *values), torch.arange(-1, len(values) + 2)
    wanted = torch.tensor([values[min(max(i, 0), len(values) - 1)] for i in index.tolist()])
    found = evaluate(term, {"h": index}, {}, torch.float32, "cpu")
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    assert wire.decode(wire.encode(term)) == term


@pytest.mark.parametrize("body", [["table", "h"], ["table", "h", "q"], ["table", "h", *range(300)]])
def test_strings_that_hold_no_table(body):
    with pytest.raises(PlanError):
        wire.decode(body)


def test_a_window_for_each_head_bounds_tiles():
    keys = tile_ranges(sympy.And(k <= q, q - k < Table(h, 4, 8)))
    assert keys.residual == sympy.true
    assert keys.lower == (q - Table(h, 4, 8) + 1,)


class HeadsParams(Params):
    window: int = Field(default=8, ge=1, description="keys of the heads that do not retrieve")
    whole: int = Field(default=1, ge=0, description="heads that keep everything")


def heads_keep(params, site):
    heads = int(site.layout.heads)
    return site.position - k < Table(h, *(1 << 20 if i < params.whole else params.window for i in range(heads)))


HEADS = Form(
    name="heads",
    kind="approximate",
    summary="some heads keep everything, others a window",
    source="a test",
    params=HeadsParams,
    rules=(CAUSAL, FROM_THE_START),
    keep=heads_keep,
    kept_keys=lambda params: Nk,
    reference=None,
)


@pytest.mark.parametrize("target", ["function", "graph"])
def test_a_form_sees_heads(monkeypatch, target):
    monkeypatch.setitem(forms.FORMS, "heads", HEADS)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, n, 50, 16, generator=generator) for n in (4, 2, 2)]
    i = torch.arange(50)
    near = (i[:, None] - i < 6) | (torch.arange(4) < 2)[:, None, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(*made, attn_mask=near & (i <= i[:, None]), enable_gqa=True)
    if target == "function":
        actual = effattn.attention(*made, form="heads", window=6, whole=2)
    else:
        rules = [{"forms": ["heads"], "params": {"heads": {"window": 6, "whole": 2}}}]
        options = {"rest": "eager", "policy": {"rule": rules}, "strict": True}
        fast = torch.compile(
            lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), backend="effattn", options=options
        )
        with torch.no_grad():
            actual = fast(*made)
    assert_close(actual, expected)
