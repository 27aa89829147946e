"""Gradients flow and stop where the user lets them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from small import INF, B, D, H, N, qkv

from effattn.ir.refusal import Why
from effattn.lowering.forms import FORMS


def detached_weights(q, k, v):
    return (q @ k.mT).softmax(-1).detach() @ v


def detached_scores(q, k, v):
    return (q @ k.mT).detach().softmax(-1) @ v


def detached_key(q, k, v):
    return (q @ k.detach().mT * 0.5).softmax(-1) @ v


def weights_without_gradient(q, k, v):
    with torch.no_grad():
        weights = (q @ k.mT).softmax(-1)
    return weights @ v


def query_without_gradient(q, k, v):
    with torch.no_grad():
        scaled = q * 0.5
    return (scaled @ k.mT).softmax(-1) @ v


def all_without_gradient(q, k, v):
    with torch.no_grad():
        out = (q @ k.mT).softmax(-1) @ v
    return out + v


def learned_bias(q, k, v):
    return (q @ k.mT + v[:, :, :, :1]).softmax(-1) @ v


def learned_scale(q, k, v):
    return (q @ k.mT * k[0, 0, 0, 0]).softmax(-1) @ v


def learned_bias_detached(q, k, v):
    return (q @ k.mT + v.detach()[:, :, :, :1] + (v * 2)[..., 0, :1, None]).softmax(-1) @ v


def learned_table(q, k, v):
    """Read at distances, for some pairs only, and once more as a factor."""
    distance = (torch.arange(N)[:, None] - torch.arange(N)).clamp(0, 5)
    causal = torch.arange(N)[:, None] >= torch.arange(N)
    scores = q @ k.mT * 0.3 * v[0, :, :1, :1].exp() + v[0, :, :, 0][:, distance]
    return scores.masked_fill(~causal, -INF).softmax(-1) @ v


def score_twice(q, k, v):
    scores = q @ k.mT
    return (scores + scores.detach()).softmax(-1) @ v


def soft_cap_and_causal(q, k, v):
    scores = torch.tanh(q @ k.mT / 4) * 4
    return scores.masked_fill(torch.ones(N, N).triu(1) > 0, -INF).softmax(-1) @ v


def shared_heads(q, k, v):
    return (q @ k[:, :1].expand(B, H, N, D).mT).softmax(-1) @ v[:, :1].expand(B, H, N, D)


def result_changed_in_place(q, k, v):
    """A product does not need its result for the gradient; attention does."""
    out = (q @ k.mT * 0.5).softmax(-1) @ v
    out += 1
    out.transpose(1, 2)[:, 0] = 0
    return out


def result_of_a_mask_changed_in_place(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.arange(N) > torch.arange(N)[:, None] + 2, -INF)
    return (scores.softmax(-1) @ v).mul_(q)


GRADIENTS = [
    (result_changed_in_place, None),
    (result_of_a_mask_changed_in_place, None),
    (detached_weights, Why.GRADIENT),
    (detached_scores, Why.GRADIENT),
    (detached_key, None),
    (weights_without_gradient, ""),
    (query_without_gradient, None),
    (all_without_gradient, None),
    (learned_bias, None),
    (learned_scale, None),
    (learned_bias_detached, None),
    (learned_table, None),
    (score_twice, ""),
    (soft_cap_and_causal, None),
    (shared_heads, None),
]


@pytest.mark.parametrize(("function", "rule"), GRADIENTS, ids=[function.__name__ for function, _ in GRADIENTS])
def test_gradients(function, rule):
    from effattn.compiler.backend import effattn

    report, _ = compiled(function, *[x.requires_grad_() for x in qkv()], verify=False)
    if rule:
        assert report.missed[0].rule == rule
    if rule is None:
        assert report.missed == []

    torch._dynamo.reset()
    fast = torch.compile(function, backend=lambda gm, given: effattn(gm, given, options={"rest": "eager"}))
    grads = []
    for run in (function, fast):
        given = [x.requires_grad_() for x in qkv()]
        out = run(*given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append([x.grad for x in given])
    for actual, expected in zip(grads[1], grads[0], strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_close(actual, expected, 1e-4)


def test_symbolic_heads_are_left_alone():
    """``dynamic=True`` makes heads and head_dim of a function's arguments symbolic too."""
    report, _ = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv(), dynamic=True)
    assert [missed.rule for missed in report.missed] == [Why.SIZES]
    report, _ = compiled(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *qkv(), dynamic=True)
    assert [missed.rule for missed in report.missed] == [Why.SIZES]


class Learned(torch.nn.Module):
    """As in Swin: a temperature, and a table that is read at relative positions."""

    def __init__(self):
        super().__init__()
        self.scale, self.table = torch.nn.Parameter(torch.ones(H, 1, 1)), torch.nn.Parameter(torch.randn(2 * N - 1, H))
        place = torch.arange(N)[:, None] - torch.arange(N) + N - 1
        self.register_buffer("place", place)

    def forward(self, q, k, v):
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        bias = self.table[self.place.view(-1)].view(N, N, H).permute(2, 0, 1)
        return (q @ k.mT * self.scale.clamp(max=4.6).exp() + bias.sigmoid() * 16).softmax(-1) @ v


@pytest.mark.parametrize("target", ["portable", "triton"])
def test_parameters_that_the_score_reads(target):
    """Their gradients, and no attention as it was written."""
    module = Learned()
    report, _ = compiled(module, *qkv(), verify=False)
    assert "softmax" not in report.graph()
    torch._dynamo.reset()
    fast = torch.compile(module, backend="effattn", options={"rest": "eager", "target": target})
    grads = []
    for run in (module, fast):
        module.zero_grad()
        given = [x.requires_grad_() for x in qkv()]
        out = run(*given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append([x.grad for x in (*given, *module.parameters())])
    assert_close(grads[1], grads[0], 1e-4)


def test_a_learned_bias_needs_no_gradient_where_none_is_recorded():
    """A parameter says that it requires a gradient also under no_grad."""
    with torch.no_grad():
        report, _ = compiled(Learned(), *qkv())
    assert "softmax" not in report.graph()
    assert [site.stage for site in report.sites] == ["encoder"]


@pytest.mark.parametrize("target", ["portable", "triton"])
@pytest.mark.parametrize("form", ["window", "power"])
def test_forms_that_are_trained(form, target):
    """A policy that names the stage: gradients of what the form keeps, nothing of what it does not."""
    params = {"window": {"window": 5, "sinks": 2}, "power": {"block": 16, "window": 16, "sinks": 3}}[form]
    policy = {"schema": 1, "rule": [{"stage": "train", "forms": [form], "params": {form: params}}]}
    length = 70
    places = torch.arange(length)
    made = FORMS[form]
    kept = made.reference(made.params(**params), places[:, None], places)

    def attention(q, k, v, kept=None):
        scores = (q @ k.mT * 0.3).masked_fill(torch.arange(length) > torch.arange(length)[:, None], -INF)
        return (scores if kept is None else scores.masked_fill(~kept, -INF)).softmax(-1) @ v

    given = [torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    torch._dynamo.reset()
    options = {"rest": "eager", "strict": True, "policy": policy, "target": target}
    fast = torch.compile(attention, backend="effattn", options=options)
    found = []
    for run, more in ((fast, ()), (attention, (kept,))):
        inputs = [x.clone().requires_grad_() for x in given]
        out = run(*inputs, *more)
        grads = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), inputs)
        found.append((out, *grads))
    assert_close(*found, 1e-4)
