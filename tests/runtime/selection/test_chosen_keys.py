"""Gradients of forms that choose at run time: those of attention over the keys that were chosen."""

from __future__ import annotations

import pytest
import sympy
import torch
from comparing import assert_close
from test_select import CASES, SCALE, causal, made, plan_of

import effattn.runtime.ops  # noqa: F401  (registers torch.ops.effattn)
from effattn.ir.attention import CaptureSpec
from effattn.ir.chosen import CELL, blocks_of_choice, over_chosen
from effattn.ir.expr import Nk, Nq, b, k, load, q
from effattn.lowering.forms import FORMS
from effattn.lowering.schedules.attention import choose
from effattn.runtime.selection.block_map import Wanted, block_map
from effattn.runtime.selection.run import select

LENGTHS = [(100, 100), (33, 90), (96, 40), (17, 17), (1, 64)]
KERNELS = [("proxy", 100, 100), ("proxy_groups", 33, 90), ("dhsa_wide_units", 96, 40), ("dhsa_tokens", 61, 70)]
ATEN = [(name, *lengths) for name in CASES for lengths in LENGTHS]


def results(attend, inputs, of_lse: bool):
    """Output and gradients of query, key and value."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out, lse = attend(*inputs)
    seen = lse.detach().isfinite()
    total = (out * weights(out)).sum()
    if of_lse:
        total = total + (lse.where(seen, 0) * weights(lse)).sum()
    return [out.detach(), *torch.autograd.grad(total, inputs)]


def weights(x):
    return torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype)


def over_keys(kept):
    """Attention in float64 over the keys of a mask; zero where there are none."""

    def attend(query, key, value):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = (SCALE * query @ key.mT).masked_fill(~kept, -torch.inf)
        lse = scores.logsumexp(-1)
        return torch.exp(scores - lse.where(lse.isfinite(), 0)[..., None]) @ value, lse

    return attend


def by_op(plan, captures=()):
    return lambda *inputs: torch.ops.effattn.attend(*inputs, list(captures), [], [], plan.encode())


@pytest.mark.parametrize(
    ("target", "name", "q_len", "k_len"),
    [*[("portable", *case) for case in ATEN], *[("triton", *case) for case in KERNELS]],
)
def test_gradients(target, name, q_len, k_len):
    form, params = CASES[name]
    inputs = made(q_len=q_len, k_len=k_len)
    allowed = causal(q_len, k_len)
    kept = FORMS[form].reference(FORMS[form].params(**params), *inputs[:2], allowed, SCALE) & allowed
    plan = plan_of(form, **params).dispatched(target=target)
    wanted = results(over_keys(kept), [x.double() for x in inputs], of_lse=True)
    for got, want in zip(results(by_op(plan), inputs, of_lse=True), wanted, strict=True):
        assert_close(got, want, exact_dtype=False)


def test_gradients_with_padding():
    """Padded keys are not chosen, and padded queries see none."""
    params = {"block": 16, "stride": 4, "least": 16, "gamma": 0.6}
    padding = torch.ones(2, 80, dtype=torch.bool)
    padding[0, :37] = False
    allowed = causal(80, 80) & padding[:, None, None]
    rule = sympy.And(k <= q + Nk - Nq, sympy.Ne(load("padding", (b, k), integer=True), 0))
    plan = plan_of("proxy", rule, (CaptureSpec("padding", "bool", 2),), **params).dispatched(target="portable")
    inputs = made(q_len=80, k_len=80)
    kept = select(plan, *inputs[:2], [padding]).rows(0, 80, 4, 80) & allowed
    wanted = results(over_keys(kept), [x.double() for x in inputs], of_lse=False)
    for got, want in zip(results(by_op(plan, [padding]), inputs, of_lse=False), wanted, strict=True):
        assert_close(got, want, exact_dtype=False)


@pytest.mark.parametrize("name", CASES)
def test_no_other_block_is_visited(name):
    """The block map of what was chosen holds these blocks, and no more."""
    form, params = CASES[name]
    plan, (query, key, _) = plan_of(form, **params), made(q_len=300, k_len=300)
    units, cells = torch.ops.effattn.chosen_keys(query, key, [], [], [], plan.encode())
    over = over_chosen(plan, 4, 2)
    chosen = (cells if cells.numel() else units) > 0
    blocks, captures = blocks_of_choice(over.spec), [units, cells][: len(over.spec.captures)]
    found = block_map(Wanted(over.spec, (2, 4, 300, 300), captures, [], [], *blocks, torch.device("cpu")))
    some = found.units(slice(None), -(-300 // blocks[1]))
    assert torch.equal(some.expand(2, 4, -1, -1), chosen[..., :-1, :-1].repeat_interleave(4 // chosen.shape[1], 1))
    assert not chosen[:, :, -1].any()
    assert not chosen[..., -1].any()
    if cells.numel():
        assert torch.equal(cells[..., :-1].sum(-1), units.sum(-1))
        assert cells.max() == CELL
    else:  # of these, only where the queries themselves are something is tested
        own = -(-params["block"] // blocks[1])
        assert (found.partial <= own).all()
    for kind in ("prefill", "backward"):
        tiles = choose(kind, over, "sm90", 16, 64, 64)
        assert params["block"] % tiles.block_m == 0
        assert tiles.block_n <= max(blocks[1], 64)


def test_they_are_the_same_in_every_run():
    form, params = CASES["proxy"]
    for target in ("portable", "triton"):
        plan = plan_of(form, **params).dispatched(target=target)
        runs = [results(by_op(plan), made(q_len=50, k_len=50), of_lse=True) for _ in range(2)]
        assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["proxy_groups", "dhsa_blocks", "dhsa_tokens"])
def test_the_ops(name):
    form, params = CASES[name]
    plan = plan_of(form, **params).dispatched(target="portable").encode()
    inputs = [tensor.requires_grad_() for tensor in made(q_len=40, k_len=50, dim=4, batch=1)]
    torch.library.opcheck(torch.ops.effattn.chosen_keys.default, (*inputs[:2], [], [], [], plan))
    torch.library.opcheck(torch.ops.effattn.attend.default, (*inputs, [], [], [], plan))
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(
        lambda *given: torch.ops.effattn.attend(*given, [], [], [], plan)[0], wide, eps=1e-6
    )


def test_empty_calls():
    form, params = CASES["proxy"]
    plan = plan_of(form, **params)
    for q_len, k_len in ((0, 5), (5, 0)):
        got = results(by_op(plan), made(q_len=q_len, k_len=k_len), of_lse=False)
        assert all((x == 0).all() for x in got)
