"""Linear attention written as a loop over blocks: spellings that are found, and loops that are something else."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from compiled import compiled

from effattn.compiler.backend import effattn
from effattn.ir.refusal import Why

B, H, N, D, C = 2, 4, 70, 16, 32
SLOPES = (2.0 ** -torch.arange(1.0, H + 1)).view(H, 1, 1)


def tables(slopes):
    place = torch.arange(C) + 1
    distance = place[:, None] - place
    rising, falling = torch.exp(-slopes * place[:, None]), torch.exp(-slopes * (C - place[:, None]))
    return rising, falling, torch.where(distance >= 0, torch.exp(-slopes * distance.clamp(min=0)), 0.0)


RISING, FALLING, TRIANGLE = tables(SLOPES)


def given(grad=False):
    torch.manual_seed(0)
    tensors = [torch.randn(B, H, N, width).div(2).requires_grad_(grad) for width in (D, D, 8)]
    return [*tensors, torch.randn(B, H, D, 8).requires_grad_(grad)]


def blocks(q, k, v, state, tables=(RISING, FALLING, TRIANGLE), slopes=SLOPES):
    rising, falling, triangle = tables
    out = []
    for start in range(0, N, C):
        end = min(start + C, N)
        size = end - start
        one, two, three = q[:, :, start:end], k[:, :, start:end], v[:, :, start:end]
        inside = (one @ two.mT * triangle[:, :size, :size]) @ three
        out.append((one * rising[:, :size]) @ state + inside)
        state = state * torch.exp(-slopes * size) + (two * falling[:, -size:]).mT @ three
    return torch.cat(out, 2), state


def computed_in_the_graph(q, k, v, state):
    return blocks(q, k, v, state, tables(SLOPES))


def from_zero(q, k, v, state):
    return blocks(q, k, v, torch.zeros_like(state))


def other_spelling(q, k, v, state):
    slopes, out = SLOPES[None], []
    for start, size in ((0, 32), (32, 32), (64, 6)):
        one, two, three = (x.narrow(2, start, size) for x in (q, k, v))
        weights = torch.mul(TRIANGLE[:, :size, :size], torch.einsum("bhid,bhjd->bhij", one, two))
        old = torch.einsum("bhde,bhid->bhie", state, RISING[:, :size] * one)
        out.append(torch.add(torch.einsum("bhij,bhje->bhie", weights, three), old))
        new = torch.einsum("bhjd,bhje->bhde", two * FALLING[:, C - size :], three)
        state = new + torch.exp(size * -slopes) * state
    return torch.cat(out, dim=-2), state


def tokens(q, k, v, state):
    out, ratio = [], torch.exp(-SLOPES)
    for place in range(N):
        one, two, three = (x[:, :, place : place + 1] for x in (q, k, v))
        state = ratio * state + two.transpose(-1, -2) @ three
        out.append(one @ state)
    return torch.cat(out, 2), state


@pytest.mark.parametrize("function", [blocks, computed_in_the_graph, from_zero, other_spelling, tokens])
def test_found(function):
    report, _ = compiled(function, *given())
    assert not report.missed, report.missed
    (site,) = report.sites
    assert (site.found_as, site.exact, site.predicate) == ("linear", True, "k <= q")
    assert site.stage == ("decode" if function is tokens else "prefill")
    assert "matmul" not in report.graph()
    assert "einsum" not in report.graph()


@pytest.mark.parametrize("function", [blocks, from_zero, tokens])
def test_gradients(function):
    """Also of the first state, and through the last."""
    torch._dynamo.reset()
    fast = torch.compile(function, backend=lambda gm, args: effattn(gm, args, options={"strict": True}))
    inputs = given(grad=True)
    outs = [run(*inputs) for run in (fast, function)]
    weights = [torch.randn_like(out) for out in outs[1]]
    actual, expected = (torch.autograd.grad(out, inputs, weights, allow_unused=True) for out in outs)
    assert_close(actual[:3], expected[:3], 1e-4)
    assert (actual[3] is None) == (expected[3] is None) or not actual[3].any()
    if expected[3] is not None:
        assert_close(actual[3], expected[3], 1e-4)


def test_gradient_of_the_first_state_alone():
    q, k, v, state = given()
    state.requires_grad_()
    report, _ = compiled(tokens, q, k, v, state, verify=False)
    assert report.sites[0].stage == "train"


# -- something else -----------------------------------------------------------------------------------------------


def changed(what):
    """The loop with one thing done differently."""

    def function(q, k, v, state):
        out, states, slopes = [], [state], SLOPES * 1.0
        order = [(0, 32), (32, 64), (64, 70)]
        if what == "order of keys":
            key_order = [(32, 64), (0, 32), (64, 70)]
        for number, (start, end) in enumerate(order):
            size = end - start
            first, last = key_order[number] if what == "order of keys" else (start, end)
            one, two, three = q[:, :, start:end], k[:, :, first:last], v[:, :, start:end]
            before = states[0] if what == "first state" else states[-1]
            aged = torch.exp(-slopes * (C if what == "length of the last" else size))
            if what == "rate of the second" and number == 1:
                aged = torch.exp(-2 * slopes * size)
            if what == "rate that is written" and number == 1:
                slopes.mul_(0.5)
            if what == "no exp":
                aged = 1 - slopes
            inside = (one @ two.mT * TRIANGLE[:, :size, :size]) @ three
            scaled = two * (RISING[:, :size] if what == "table of keys" else FALLING[:, -size:])
            out.append((one * RISING[:, :size]) @ before + inside)
            states.append(states[-1] * aged + scaled.mT @ three)
        if what == "last block":
            out.pop()
        if what == "inner state":
            return torch.cat(out, 2), states[1]
        if what == "value that is written":
            v.add_(1)
        return torch.cat(out, 2), states[-1]

    return function


CHANGES = {
    "order of keys": Why.BLOCKS,
    "first state": Why.LOOP_OVER_BLOCKS,
    "length of the last": Why.DECAY,
    "rate of the second": Why.DECAY,
    "rate that is written": Why.DECAY,
    "no exp": Why.DECAY,
    "table of keys": Why.DECAY,
    "last block": Why.BLOCKS,
    "inner state": Why.LOOP_OVER_BLOCKS,
    "value that is written": Why.MEMORY,
}


@pytest.mark.parametrize("what", CHANGES)
def test_left_alone(what):
    report, _ = compiled(changed(what), *given())
    assert not report.sites
    assert "effattn" not in report.graph()
    (missed,) = report.missed
    assert missed.rule == CHANGES[what], missed


def test_the_unchanged_loop_is_found():
    report, _ = compiled(changed("nothing"), *given())
    assert len(report.sites) == 1


def stopped(q, k, v, state):
    out = []
    for start in (0, 32):
        one, two, three = (x[:, :, start : start + C] for x in (q[:, :, :64], k[:, :, :64], v[:, :, :64]))
        out.append((one * RISING) @ state + (one @ two.mT * TRIANGLE) @ three)
        state = (state * torch.exp(-SLOPES * C) + (two * FALLING).mT @ three).detach()
    return torch.cat(out, 2)


def test_a_state_without_gradient_is_no_state():
    """Truncated back-propagation through time is not this op's gradient."""
    torch._dynamo.reset()
    fast = torch.compile(stopped, backend=lambda gm, args: effattn(gm, args, options={"strict": True, "rest": "eager"}))
    inputs = given(grad=True)
    grads = [torch.autograd.grad(run(*inputs).sum(), inputs) for run in (fast, stopped)]
    assert_close(*grads)
