"""Attention without a softmax: what is found, that it stays the same function, and what is left alone."""

from __future__ import annotations

import pathlib
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled

from effattn.compiler.backend import effattn
from effattn.errors import FormRefused, VerificationError
from effattn.ir.refusal import Why
from effattn.passes.match.anchors import linear

B, H, N, D = 2, 4, 70, 16
SLOPES = 2.0 ** -torch.arange(1.0, H + 1)


def qkv(heads=H, kv_heads=None, length=N, dtype=torch.float32, grad=False):
    torch.manual_seed(0)
    kv_heads = kv_heads or heads
    shapes = [(B, heads, length, D), (B, kv_heads, length, D), (B, kv_heads, length, D)]
    return [torch.randn(shape, dtype=dtype).div(2).requires_grad_(grad) for shape in shapes]


def distance(length):
    place = torch.arange(length)
    return place[:, None] - place[None, :]


def where(q, k, v, slopes):
    ages = distance(q.shape[2])
    mask = torch.where(ages >= 0, torch.exp(-slopes[:, None, None] * ages), 0.0)
    return ((q @ k.mT) * mask) @ v


def inside_exp(q, k, v, slopes):
    ages = distance(q.shape[2])
    mask = torch.exp(torch.where(ages >= 0, -0.25 * ages, -torch.inf))
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k) * mask, v)


def tril_then_scale(q, k, v, slopes):
    ages = distance(q.shape[2])
    decay = torch.exp(-(slopes.view(1, -1, 1, 1) * ages.clamp(min=0))).tril()
    return torch.matmul(decay * torch.matmul(q * D**-0.5, k.transpose(2, 3)), v)


def power(q, k, v, slopes):
    gamma = 1 - slopes
    mask = (gamma[:, None, None] ** distance(q.shape[2]).clamp(min=0)).masked_fill(distance(q.shape[2]) < 0, 0)
    return (mask * (q @ k.mT) / 3) @ v


def number_to_a_power(q, k, v, slopes):
    return ((q @ k.mT) * (0.9 ** distance(q.shape[2])).tril()) @ v


def slopes_by_formula(q, k, v, slopes):
    rates = (torch.arange(H) + 1) / H
    return ((q @ k.mT) * torch.exp(-rates[:, None, None] * distance(q.shape[2])).tril()) @ v


def heads_behind(q, k, v, slopes):
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    mask = torch.exp(-slopes[:, None, None] * distance(q.shape[1])).tril()
    weights = torch.einsum("bihd,bjhd->bhij", q, k) * mask
    return torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, -1, H * D)


def no_decay(q, k, v, slopes):
    return (q @ k.mT).tril() @ v


def masked_scores(q, k, v, slopes):
    scores = q @ k.mT * 0.5
    scores = scores.masked_fill(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1), 0)
    return F.dropout(scores, 0.1, training=False) @ v


def no_batch(q, k, v, slopes):
    q, k, v = q[0, 0], k[0, 0], v[0, 0]
    return ((q @ k.T) * torch.exp(-slopes[1] * distance(q.shape[0])).tril()) @ v


SPELLINGS = {
    function.__name__: function
    for function in (
        where,
        inside_exp,
        tril_then_scale,
        power,
        number_to_a_power,
        slopes_by_formula,
        heads_behind,
        no_decay,
        masked_scores,
        no_batch,
    )
}


def only_site(report):
    assert not report.missed, report.missed
    (site,) = report.sites
    assert (site.found_as, site.form, site.exact) == ("linear", "linear", True)
    return site


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    report, _ = compiled(SPELLINGS[name], *qkv(), SLOPES)
    site = only_site(report)
    assert site.predicate == "k <= q"
    assert "effattn.linear" in report.graph()
    assert "matmul" not in report.graph()
    assert "einsum" not in report.graph()


@pytest.mark.parametrize("name", ["where", "power", "heads_behind", "no_decay"])
def test_dynamic_lengths(name):
    function = SPELLINGS[name]
    torch._dynamo.reset()
    fast = torch.compile(
        function, dynamic=True, fullgraph=True, backend=lambda gm, args: effattn(gm, args, options=OPTIONS)
    )
    for length in (33, 71, 257):
        given = qkv(length=length)
        assert_close(fast(*given, SLOPES), function(*given, SLOPES))


OPTIONS = {"strict": True, "rest": "eager"}


@pytest.mark.parametrize("name", ["where", "tril_then_scale", "heads_behind", "no_decay"])
def test_gradients(name):
    function = SPELLINGS[name]
    torch._dynamo.reset()
    options = {"strict": True} if name == "where" else OPTIONS
    fast = torch.compile(function, backend=lambda gm, args: effattn(gm, args, options=options))
    given = qkv(grad=True)
    actual, expected = (run(*given, SLOPES) for run in (fast, function))
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, given, weight) for out in (actual, expected)]
    assert_close(*grads)


def repeated(q, k, v, slopes):
    k, v = (x[:, :, None].expand(B, 2, 2, N, D).reshape(B, 4, N, D) for x in (k, v))
    return where(q, k, v, slopes)


def test_grouped_heads_are_not_expanded():
    report, _ = compiled(repeated, *qkv(4, 2), SLOPES)
    assert "grouped heads folded back: key and value are not expanded" in only_site(report).notes
    assert "heads 4/2" in only_site(report).layout


# -- normalisers --------------------------------------------------------------------------------------------------


def phi(x):
    return F.elu(x) + 1


def weights_divided(q, k, v):
    weights = (phi(q) @ phi(k).mT).tril()
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return weights @ v


def output_divided(q, k, v):
    weights = (phi(q) @ phi(k).mT).tril()
    return (weights @ v) / (weights.sum(dim=-1)[..., None] + 1e-6)


def output_divided_with_decay(q, k, v):
    weights = (phi(q) @ phi(k).mT) * torch.exp(-0.1 * distance(q.shape[2])).tril()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def both_directions(q, k, v):
    weights = torch.einsum("bhid,bhjd->bhij", phi(q), phi(k))
    return torch.einsum("bhij,bhjd->bhid", weights / (1e-4 + weights.sum(-1).unsqueeze(-1)), v)


NORMALISED = {
    "weights_divided": (weights_divided, "k <= q", "sum + 1e-06"),
    "output_divided": (output_divided, "k <= q", "sum + 1e-06"),
    "output_divided_with_decay": (output_divided_with_decay, "k <= q", "its sum"),
    "both_directions": (both_directions, "true", "sum + 0.0001"),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_normalisers(name):
    function, predicate, words = NORMALISED[name]
    report, _ = compiled(function, *qkv())
    site = only_site(report)
    assert site.predicate == predicate
    assert words in site.score
    given = qkv(grad=True)
    torch._dynamo.reset()
    fast = torch.compile(function, backend=lambda gm, args: effattn(gm, args, options=OPTIONS))
    grads = [torch.autograd.grad(run(*given).square().sum(), given) for run in (fast, function)]
    assert_close(*grads, 1e-4)


def test_bfloat16():
    """The last cast of the mask is looked through: the weights are more exact than the user's."""

    def function(q, k, v, slopes):
        mask = torch.exp(-slopes[:, None, None] * distance(q.shape[2])).tril().to(q.dtype)
        return ((q @ k.mT) * mask) @ v

    given = qkv(dtype=torch.bfloat16)
    report, actual = compiled(function, *given, SLOPES, tolerance=5e-2)
    only_site(report)
    exact = where(*(x.double() for x in given), SLOPES.double())
    errors = [(out.double() - exact).abs().max() for out in (actual, function(*given, SLOPES))]
    assert errors[0] <= 1.5 * errors[1]  # rounding alone, in another order on other processors


def test_slopes_that_change_between_calls_are_read_anew():
    torch._dynamo.reset()
    fast = torch.compile(where, backend=lambda gm, args: effattn(gm, args, options=OPTIONS))
    given = qkv()
    for factor in (1.0, 3.0):
        assert_close(fast(*given, SLOPES * factor), where(*given, SLOPES * factor))


def test_slopes_that_are_written_in_between_are_read_before():
    def function(q, k, v, slopes):
        slopes = slopes * 1.0
        mask = torch.exp(-slopes[:, None, None] * distance(q.shape[2])).tril()
        scores = (q @ k.mT) * mask
        slopes.add_(1.0)
        return scores @ v, slopes

    report, _ = compiled(function, *qkv(), SLOPES)
    only_site(report)


# -- left alone ---------------------------------------------------------------------------------------------------


def strictly_before(q, k, v, slopes):
    return (q @ k.mT).tril(-1) @ v


def sign_unknown(q, k, v, slopes):
    mask = torch.exp(slopes[:, None, None] * torch.where(distance(N) >= 0, -distance(N), -torch.inf))
    return ((q @ k.mT) * mask) @ v


def two_sided(q, k, v, slopes):
    return ((q @ k.mT) * torch.exp(-0.1 * distance(N).abs())) @ v


def grows(q, k, v, slopes):
    return ((q @ k.mT) * torch.exp(0.01 * distance(N)).tril()) @ v


def rate_per_token(q, k, v, slopes):
    rates = q[..., 0].cumsum(-1)
    return ((q @ k.mT) * torch.exp(rates[..., :, None] - rates[..., None, :]).tril()) @ v


def square_of_distance(q, k, v, slopes):
    return ((q @ k.mT) * torch.exp(-0.1 * distance(N) ** 2).tril()) @ v


def factor_per_head(q, k, v, slopes):
    return ((q @ k.mT) * slopes[:, None, None]).tril() @ v


def weights_returned(q, k, v, slopes):
    weights = (q @ k.mT).tril()
    return weights @ v, weights


def limited(q, k, v, slopes):
    weights = (phi(q) @ phi(k).mT).tril()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) @ v


def fewer_queries(q, k, v, slopes):
    return (q[:, :, 30:] @ k.mT).tril() @ v


def per_batch(q, k, v, slopes):
    rates = q[:, :, 0, 0].abs()
    return ((q @ k.mT) * torch.exp(-rates[..., None, None] * distance(N)).tril()) @ v


LEFT_ALONE = {
    strictly_before: Why.WEIGHTS,
    sign_unknown: Why.MASKED_WEIGHTS,
    two_sided: Why.BOTH_DIRECTIONS,
    grows: Why.DECAY,
    rate_per_token: Why.WEIGHTS,
    square_of_distance: (Why.DECAY, Why.WEIGHTS),
    factor_per_head: Why.SCALE,
    weights_returned: Why.WEIGHTS,
    limited: Why.NORMALISER,
    fewer_queries: Why.LENGTHS,
    per_batch: (Why.DECAY, Why.WEIGHTS),
}


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda function: function.__name__)
def test_left_alone(function):
    report, _ = compiled(function, *qkv(), SLOPES)
    assert not report.sites
    assert "effattn.linear" not in report.graph()
    (missed,) = report.missed
    rules = LEFT_ALONE[function]
    assert missed.rule in (rules if isinstance(rules, tuple) else (rules,)), missed


def low_rank(q, k, v, slopes):
    return (q @ k.mT * 0.5) @ v


def experts(q, k, v, slopes):
    """Two layers with a gate between, times exp() of a router's scores for each row."""
    routed = torch.exp(v[..., :1].log_softmax(2))
    return (F.silu(q @ k.mT) * (q @ v.mT) * routed) @ v


def masked_by_data(q, k, v, slopes):
    return ((q @ k.mT) * (v[..., :1] > 0)) @ v


NOT_SPOKEN_OF = [low_rank, experts, masked_by_data]


@pytest.mark.parametrize("function", NOT_SPOKEN_OF, ids=lambda function: function.__name__)
def test_other_products_are_not_spoken_of(function):
    report, _ = compiled(function, *qkv(), SLOPES)
    assert not report.sites
    assert not report.missed


def test_learned_decay_is_left_alone_where_it_needs_a_gradient():
    slopes = SLOPES.clone().requires_grad_()
    torch._dynamo.reset()
    fast = torch.compile(where, backend=lambda gm, args: effattn(gm, args, options=OPTIONS))
    given = qkv(grad=True)
    grads = [torch.autograd.grad(run(*given, slopes).sum(), (*given, slopes)) for run in (fast, where)]
    assert_close(*grads)
    report, _ = compiled(where, *qkv(), slopes.detach())
    only_site(report)


def test_beside_a_softmax():
    def function(q, k, v, slopes):
        return F.scaled_dot_product_attention(where(q, k, v, slopes), k, v, is_causal=True)

    report, _ = compiled(function, *qkv(), SLOPES)
    assert sorted(site.found_as for site in report.sites) == ["linear", "sdpa"]


def test_a_policy_reaches_it_and_says_that_no_form_applies():
    def function(q, k, v, slopes):
        return F.scaled_dot_product_attention(where(q, k, v, slopes), k, v, is_causal=True)

    for forms in (["window"], ["auto", "window"], ["linear"]):
        policy = {"rule": [{"forms": forms, "params": {forms[-1]: {"window": 8}}}]}
        report, _ = compiled(function, *qkv(), SLOPES, strict=False, verify=False, policy=policy)
        linear, softmax = report.sites
        assert (linear.form, linear.here, linear.exact, linear.params) == ("linear", "linear", True, {})
        assert [one["accepted"] for one in linear.candidates] == [False, True]
        assert f"{forms[-1]} refused: the graph spells linear attention" in linear.reason
        assert softmax.found_as == "sdpa"
    torch._dynamo.reset()
    with pytest.raises(FormRefused, match="window refused: the graph spells linear attention"):
        compiled(where, *qkv(), SLOPES, policy={"rule": [{"forms": ["window"]}]})


def test_verify_looks_at_its_mask(monkeypatch):
    """Also beside approximate forms, where outputs are not compared."""
    real = linear.interpret
    monkeypatch.setattr(linear, "interpret", lambda term: replace(real(term), causal=True))
    with pytest.raises(VerificationError, match="the mask was read as k <= q"):
        compiled(both_directions, *qkv())


def test_a_value_that_is_scaled():
    def function(q, k, v, slopes):
        return ((q @ k.mT) * torch.exp(-slopes[:, None, None] * distance(q.shape[2])).tril()) @ (v * 0.25)

    report, _ = compiled(function, *qkv(), SLOPES)
    only_site(report)


def test_a_result_that_is_written_later_keeps_its_gradient():
    def function(q, k, v, slopes):
        out = where(q, k, v, slopes)
        first = out * 2
        out.add_(1.0)
        return first + out

    torch._dynamo.reset()
    fast = torch.compile(function, backend=lambda gm, args: effattn(gm, args, options=OPTIONS))
    given = qkv(grad=True)
    grads = [torch.autograd.grad(run(*given, SLOPES).square().sum(), given) for run in (fast, function)]
    assert_close(*grads, 1e-4)


def test_one_after_another_with_a_softmax_between():
    def function(q, k, v, slopes):
        return where((where(q, k, v, slopes) @ k.mT).softmax(-1) @ v, k, v, slopes)

    report, _ = compiled(function, *qkv(), SLOPES)
    named = [(site.name, site.found_as) for site in report.sites]
    assert named == [("attention#0", "linear"), ("attention#1", "softmax"), ("attention#2", "linear")]
    assert "matmul" not in report.graph()


def test_lightning_block_of_the_examples():
    sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / "examples"))
    from lightning_block import LightningBlock

    torch.manual_seed(0)
    block = LightningBlock(64, 4)
    x = torch.randn(2, 130, 64)
    torch._dynamo.reset()
    fast = torch.compile(block, fullgraph=True, backend=lambda gm, args: effattn(gm, args, options=OPTIONS))
    expected, actual = block(x), fast(x)
    assert_close(actual, expected)
    grads = [torch.autograd.grad(out.square().sum(), tuple(block.parameters())) for out in (actual, expected)]
    assert_close(*grads, 1e-3)
