"""Keys that data allows are found first: tiles without any are skipped, tiles of nothing else are not tested."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from checking import check, check_gradients
from comparing import assert_close
from plans import CASES, CAUSAL, Call, Sizes, power_keep, tensors
from sites import causal_site

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import b, first_key, h, k, load, q, s
from effattn.ir.plan import Plan
from effattn.lowering.forms.window import WINDOW
from effattn.lowering.iteration.tile_ranges import key_conditions, tile_ranges
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime.targets import triton as triton_target
from effattn.runtime.targets.first_keys import with_first_keys

CPU = torch.device("cpu")
SMALL = Tiles(16, 16, 4, 1)
PADDING = sympy.Ne(load("padding", [b, k], integer=True), 0)
KEYS = 90
# which of 90 keys each batch row may attend to
PATTERNS = {
    "all": [(0, 90), (0, 90)],
    "left": [(0, 90), (37, 90)],
    "right": [(0, 90), (0, 33)],
    "within a tile": [(35, 41), (48, 64)],
    "one key": [(89, 90), (0, 1)],
    "nothing": [(5, 5), (0, 90)],
    "nothing at all": [(0, 0), (0, 0)],
}
SIZES = Sizes(q_len=KEYS, k_len=KEYS, heads=1)
RULES = {
    "causal": CAUSAL,
    "all": sympy.true,
    "window and sinks": sympy.And(CAUSAL, sympy.Or(q - k < 21, k < 20)),
    "power": sympy.And(CAUSAL, power_keep(16, 16, 7)),
    "documents too": sympy.And(
        CAUSAL, sympy.Eq(load("document", [b, q], integer=True), load("document", [b, k], integer=True))
    ),
}


def mask_of(pattern: str) -> torch.Tensor:
    if pattern == "holes":
        return torch.rand(2, KEYS, generator=torch.Generator().manual_seed(1)) > 0.4
    columns = torch.arange(KEYS)
    return torch.stack([(columns >= first) & (columns < end) for first, end in PATTERNS[pattern]])


def call_of(pattern: str, rule: str = "causal", empty_rows: str = "zero", dtype=torch.bool) -> Call:
    captures = {"padding": mask_of(pattern).to(dtype), "document": torch.arange(KEYS).div(40).long().expand(2, -1)}
    names = ["padding", *(["document"] if rule == "documents too" else [])]
    specs = tuple(CaptureSpec(name, str(captures[name].dtype).removeprefix("torch."), 2) for name in names)
    plan = Plan(
        "exact", AttentionSpec(SIZES.scale * s, sympy.And(RULES[rule], PADDING), captures=specs, empty_rows=empty_rows)
    )
    return Call(plan, [captures[name] for name in names])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pattern", [*PATTERNS, "holes"])
def test_every_pattern(pattern, rule):
    check(call_of(pattern, rule), *tensors(SIZES), config=SMALL, kind="prefill")


FORMS = {
    "window": WINDOW.keep(WINDOW.params(window=21, sinks=9), causal_site(predicate=sympy.And(CAUSAL, PADDING))),
    "power": power_keep(16, 16, 7).subs(k < 7, k < first_key + 7),
}


def of_form(form: str, pattern: str, position=q) -> Call:
    """A form whose first keys are counted from where the text begins, as the op completes it."""
    call = call_of(pattern)
    keep = FORMS[form].subs(q, position)
    spec = replace(call.plan.spec, predicate=sympy.And(k <= position, PADDING), keep=keep)
    plan = replace(call.plan, spec=spec).at(KEYS)
    assert plan.spec.keep.has(first_key)
    return Call(plan, with_first_keys(plan, *tensors(SIZES)[:2], call.captures, [], []))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["left", "right", "holes", "nothing"])
def test_forms_on_padding(pattern, form):
    check(of_form(form, pattern), *tensors(SIZES), config=SMALL, kind="prefill")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["left", "holes", "nothing"])
def test_gradients_of_forms_on_padding(pattern, form):
    """By the op, which counts from where the text begins in the backward, too."""
    call = of_form(form, pattern)
    check_gradients(call, tensors(SIZES))
    given = replace(call.plan, spec=call.plan.spec.given)
    grads = []
    for plan, captures in ((call.plan, call.captures), (given, call.captures[:-1])):
        inputs = [tensor.requires_grad_() for tensor in tensors(SIZES)]
        out, _ = torch.ops.effattn.attend(*inputs, captures, [], [], plan.dispatched(target="portable").encode())
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        grads.append(torch.autograd.grad((out * weights).sum(), inputs))
    assert_close(*grads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["left", "holes"])
def test_decode_steps_of_forms_on_padding(pattern, form):
    sizes = Sizes(q_len=1, k_len=KEYS, heads=4)
    check(of_form(form, pattern, q + KEYS - 1), *tensors(sizes), config=SMALL, kind="decode", splits=3)


@pytest.mark.parametrize("empty_rows", ["zero", "nan", "mean"])
@pytest.mark.parametrize("pattern", ["nothing", "within a tile"])
def test_rows_without_keys(pattern, empty_rows):
    check(call_of(pattern, empty_rows=empty_rows, dtype=torch.int64), *tensors(SIZES), config=SMALL, kind="prefill")


@pytest.mark.parametrize("pattern", [*PATTERNS, "holes"])
def test_decode(pattern):
    sizes = Sizes(q_len=1, k_len=KEYS, heads=4)
    check(call_of(pattern, "all", "nan"), *tensors(sizes), config=SMALL, kind="decode", splits=3)


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [*((name, "causal") for name in ("left", "right", "nothing", "holes")), ("within a tile", "window and sinks")],
)
def test_backward(pattern, rule):
    check_gradients(call_of(pattern, rule), tensors(replace(SIZES, heads=2)))


def test_more_keys_than_one_program_reads_at_once():
    sizes = Sizes(batch=1, heads=1, q_len=3, k_len=70_000)
    seen = torch.zeros(1, 70_000, dtype=torch.int64)
    seen[:, 40_500:66_001] = 1
    plan = Plan("exact", AttentionSpec(sizes.scale * s, PADDING, captures=(CaptureSpec("padding", "int64", 2),)))
    check(Call(plan, [seen]), *tensors(sizes), config=Tiles(16, 512, 4, 1), kind="prefill")


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_tiles_without_allowed_keys_are_not_read(kind):
    """What such tiles hold does not matter, not even NaN, which a weight of zero would not remove."""
    call = call_of("left", "all")
    call.captures[0][:, :37] = False
    query, key, value = tensors(Sizes(q_len=1 if kind == "decode" else KEYS, k_len=KEYS))
    options = {"config": SMALL, "kind": kind} | ({"splits": 2} if kind == "decode" else {})
    wanted, _ = triton_target.run(call.plan, query, key, value, call.captures, **options)
    key[:, :, :32], value[:, :, :32] = torch.nan, torch.nan
    out, _ = triton_target.run(call.plan, query, key, value, call.captures, **options)
    torch.testing.assert_close(out, wanted, atol=0, rtol=0)


def test_backward_skips_keys_that_are_not_allowed():
    call = call_of("right")
    call.captures[0][:, 33:] = False
    inputs = tensors(SIZES)
    out, lse = triton_target.run(call.plan, *inputs, call.captures, config=SMALL, kind="prefill")
    grad = torch.ones_like(out)
    wanted = triton_target.run_backward(call.plan, grad, None, *inputs, out, lse, call.captures, config=SMALL)
    inputs[1][:, :, 48:], inputs[2][:, :, 48:] = torch.nan, torch.nan
    grads = triton_target.run_backward(call.plan, grad, None, *inputs, out, lse, call.captures, config=SMALL)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_which_conditions_are_found_beforehand():
    opaque = sympy.Ne(load("mask", [b, h, q, k], integer=True), 0)
    by_row = sympy.Eq(load("document", [b, q], integer=True), load("document", [b, k], integer=True))
    odd = sympy.Ne(sympy.Mod(k, 3), 1)
    alone, others = key_conditions(tile_ranges(sympy.And(CAUSAL, PADDING, opaque, by_row, odd)).residual)
    assert alone == PADDING
    assert others == sympy.And(opaque, by_row, odd)
    assert key_conditions(tile_ranges(CASES["causal"](SIZES, CPU).plan.spec.rule).residual) == (sympy.true, sympy.true)
