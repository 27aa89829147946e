"""Live dropout of the weights, as models spell it. ``verify`` drops in user code what the op drops."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.errors import VerificationError
from effattn.ir.refusal import Why
from effattn.lowering.forms import FORMS
from effattn.lowering.forms.form import NO_DROPOUT
from effattn.runtime import philox

N, P = 21, 0.3


def qkv(heads: int = 3, kv_heads: int = 3, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = (torch.randn(2, count, N, 8, generator=generator) for count in (heads, kv_heads, kv_heads))
    return [tensor.to(dtype).requires_grad_() for tensor in made]


PAD = torch.arange(N) < torch.tensor([[N], [13]])
NOTHING_SEEN = torch.arange(N) < torch.tensor([[0], [13]])


def run(function, *args, grad: bool = True, **options):
    """(report, output) of a function compiled strictly and verified; its gradients are computed, too."""
    given = {"rest": "eager", "strict": True, "verify": True, **options}
    torch._dynamo.reset()
    with collect.listening() as heard:
        out = torch.compile(function, backend="effattn", options=given)(*args)
        if grad:
            out.sum().backward()
    return heard.report(Options.read(given)), out


def additive(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(2, 1, 1, N).masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)


def bert(q, k, v):
    weights = nn.functional.softmax(q @ k.transpose(-1, -2) / 8**0.5 + additive(PAD), dim=-1)
    return nn.functional.dropout(weights, p=P, training=True) @ v


def rows_without_keys(q, k, v):
    return F.dropout((q @ k.mT + additive(NOTHING_SEEN)).softmax(-1), P) @ v


def rows_of_nan(q, k, v):
    return F.dropout((q @ k.mT).masked_fill(~NOTHING_SEEN[:, None, None], -torch.inf).softmax(-1), P) @ v


def llama(q, k, v):
    k, v = (x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(2, 3, N, 8) for x in (k, v))
    scores = q @ k.mT * 0.3 + torch.full((N, N), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return F.dropout(F.softmax(scores, -1, dtype=torch.float32).to(q.dtype), p=P, training=True) @ v


def batch_times_heads(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).masked_fill(~PAD.repeat_interleave(3, 0)[:, None], -1e9).softmax(-1)
    return torch.bmm(torch.dropout(weights, P, True), v).unflatten(0, (2, 3))


def grouped(q, k, v):
    scores = torch.einsum("bgqd,bkd->bgqk", q, k[:, 0]) + torch.arange(N)
    return torch.einsum("bgqk,bkd->bgqd", F.dropout(scores.softmax(-1), P), v[:, 0])


def bnhd(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", F.dropout(weights.transpose(2, 3), P).transpose(2, 3), v)


def capped(q, k, v):
    return F.dropout((torch.tanh(q @ k.mT / 5) * 5).softmax(-1), P) @ v


def sdpa_with_padding(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=PAD[:, None, None], dropout_p=P)


def sdpa_with_bias(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(torch.arange(N) * 0.1).expand(N, N), dropout_p=P)


def plain_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=P)


def beside_other_dropout(q, k, v):
    q = F.dropout(q, 0.2)
    return F.dropout(sdpa_with_padding(q, k, v) + bert(q, k, F.dropout(v, 0.1)), 0.2)


def sink(q, k, v):
    scores = torch.cat([q @ k.mT, torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1).expand(2, 3, N, 1)], dim=-1)
    return F.dropout(scores.softmax(-1)[..., :-1], P) @ v


FOUND = (sink, bert, rows_without_keys, rows_of_nan, batch_times_heads, bnhd, capped)
FOUND += (sdpa_with_padding, sdpa_with_bias, plain_sdpa, beside_other_dropout)


@pytest.mark.parametrize("function", FOUND, ids=lambda function: function.__name__)
def test_found(function):
    report, _ = run(function, *qkv())
    assert len(report.sites) == (2 if function is beside_other_dropout else 1)
    assert report.missed == []
    for site in report.sites:
        assert site.replaced
        assert site.kernel.startswith("portable")
        assert f"dropout of the weights, p={P}" in site.notes


@pytest.mark.parametrize(("function", "kv_heads"), [(llama, 1), (grouped, 1)], ids=["llama", "grouped"])
def test_grouped_heads(function, kv_heads):
    for dtype in (torch.float32, torch.bfloat16) if function is llama else (torch.float32,):
        report, out = run(function, *qkv(3, kv_heads, dtype))
        assert (len(report.sites), report.missed, out.dtype) == (1, [], dtype)


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=P, batch_first=True, **options)

    def forward(self, x, hidden):
        return self.layer(x, src_key_padding_mask=hidden)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(norm_first):
    report, _ = run(Encoder(norm_first=norm_first).train(), torch.randn(2, N, 24), ~PAD)
    assert [(site.replaced, site.found_as) for site in report.sites] == [(True, "multi_head_attention")]
    assert report.missed == []


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(need_weights):
    module = nn.MultiheadAttention(24, 3, dropout=P, batch_first=True).train()

    def call(x):
        return module(x, x, x, key_padding_mask=~PAD, need_weights=need_weights)[0]

    report, _ = run(call, torch.randn(2, N, 24))
    assert (len(report.sites), report.missed) == (1, [])
    module.eval()
    report, _ = run(call, torch.randn(2, N, 24))
    assert len(report.sites) == 1
    assert not any("dropout" in note for note in report.sites[0].notes)


def twice(q, k, v):
    return F.dropout(F.dropout((q @ k.mT).softmax(-1), P), P) @ v


def of_scores(q, k, v):
    return F.dropout(q @ k.mT, P).softmax(-1) @ v


def of_heads(q, k, v):
    return F.dropout2d((q @ k.mT).softmax(-1), P) @ v


def alpha(q, k, v):
    return F.alpha_dropout((q @ k.mT).softmax(-1), P, training=True) @ v


def all_of_them(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 1.0) @ v


def all_of_them_in_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=1.0)


def in_place(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), P, inplace=True) @ v


def one_mask_for_a_difference(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1) - 0.5 * (q @ k.mT * 2).softmax(-1), P) @ v


def dropped_weights_used_twice(q, k, v):
    weights = F.dropout((q @ k.mT).softmax(-1), P)
    return weights @ v + (weights @ v.flip(-2)) * weights.sum(-1, keepdim=True)


LEFT_ALONE = {
    twice: Why.DROPOUT,
    of_scores: Why.NO_PRODUCT,
    of_heads: Why.DROPOUT,
    alpha: Why.DROPOUT,
    all_of_them: Why.DROPOUT,
    all_of_them_in_sdpa: Why.DROPOUT,
    in_place: Why.WEIGHTS,
    one_mask_for_a_difference: Why.WEIGHTS,
    dropped_weights_used_twice: Why.WEIGHTS,
}


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda function: function.__name__)
def test_left_alone(function):
    def seeded(q, k, v):
        torch.manual_seed(0)
        return function(q, k, v)

    report, out = run(seeded, *qkv(), grad=False)
    assert report.sites == []
    assert {missed.rule for missed in report.missed} == {LEFT_ALONE[function]}, report.missed
    assert_close(out, seeded(*qkv()))


def test_a_probability_that_changes_is_no_constant():
    def call(q, k, v, p):
        return F.dropout((q @ k.mT).softmax(-1), p) @ v

    torch._dynamo.reset()
    fast = torch.compile(call, backend="effattn", options={"rest": "eager"})
    with collect.listening() as heard:
        for p in (0.1, 0.9, 0.0):  # compiled anew for each, or left alone with one that is symbolic
            torch.manual_seed(1)
            out = fast(*qkv(), p)
            share = (torch.stack([fast(*qkv(), p) for _ in range(8)]) - out).abs().mean()
            assert (share == 0) == (p == 0)
    report = heard.report(Options.read({"rest": "eager"}))
    assert {missed.rule for missed in report.missed} <= {Why.DROPOUT}


def test_dropped_weights_are_found_wrong(monkeypatch):
    """``verify`` compares with the same weights dropped: those of other places are told."""
    run(bert, *qkv())
    right = philox.kept
    monkeypatch.setattr("effattn.runtime.targets.portable.call.philox.kept", lambda *given: ~right(*given))
    monkeypatch.setattr("effattn.compiler.same_dropout.philox", type("Own", (), {"kept": right, "SEEDS": philox.SEEDS}))
    with pytest.raises(VerificationError, match="output 0"):
        run(bert, *qkv())


@pytest.mark.parametrize("form", ["window", "proxy", "dhsa", "linear"])
def test_forms(form):
    policy = {"rule": [{"forms": [form, "exact"]}]}
    report, _ = run(plain_sdpa, *qkv(), policy=policy, strict=False, verify=False)
    (site,) = report.sites
    assert site.form == (form if form == "window" else "exact")
    assert form == "window" or "dropout is live" in site.reason


def test_forms_without_dropout_say_so():
    none = {name for name, form in FORMS.items() if form.select is not None or not form.softmax}
    assert {name for name, form in FORMS.items() if NO_DROPOUT in form.rules} == none


@pytest.mark.parametrize("function", [bert, llama, rows_without_keys], ids=lambda function: function.__name__)
def test_sdpas_own_dropout_where_it_needs_no_large_tensor(function, monkeypatch):
    """As on a GPU: a mask that SDPA has no kernel for is ours."""
    monkeypatch.setattr("effattn.runtime.targets.sdpa.drops", lambda device: True)
    report, out = run(function, *qkv(3, 1 if function is llama else 3))
    (site,) = report.sites
    assert site.replaced
    assert ("dropout_p = 0.3" in report.graph()) == (function is llama)
    assert ("effattn.attend" in report.graph()) == (function is not llama)
    assert out.requires_grad


def test_kept_sdpa_draws_what_it_draws_alone(monkeypatch):
    monkeypatch.setattr("effattn.runtime.targets.sdpa.drops", lambda device: True)

    def seeded(q, k, v):
        torch.manual_seed(1)
        return plain_sdpa(q, k, v)

    report, out = run(seeded, *qkv())
    assert not report.sites[0].replaced
    assert_close(out, seeded(*qkv()))


def test_lengths_may_change():
    def call(q, k, v, hidden):
        return F.dropout((q @ k.mT).masked_fill(hidden, -1e9).softmax(-1), P) @ v

    torch._dynamo.reset()
    fast = torch.compile(call, backend="effattn", options={"rest": "eager", "strict": True, "verify": True})
    with collect.listening() as heard:
        for length in (17, 21, 30):
            q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3))
            fast(q, k, v, torch.arange(length) > torch.arange(length)[:, None]).sum().backward()
    report = heard.report(Options.read({"rest": "eager"}))
    assert report.missed == []
    assert len(report.sites) == 2  # one for each graph


def fast_bert(**options):
    torch._dynamo.reset()
    return torch.compile(bert, backend="effattn", options={"rest": "eager", **options})


def test_seeds_are_pytorchs():
    fast, given = fast_bert(), qkv()

    def drawn(seed=None) -> torch.Tensor:
        with nullcontext() if seed is None else torch.random.fork_rng():
            if seed is not None:
                torch.manual_seed(seed)
            return fast(*given)

    torch.manual_seed(2)
    first, second = drawn(), drawn()
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    forked = drawn(9)
    assert torch.equal(drawn(), first)
    assert torch.equal(drawn(), second)
    assert torch.equal(drawn(9), forked)


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_gradients_are_those_of_the_weights_that_were_kept(rest):
    """The output is a linear function of value; ``inductor`` also recomputes it in a checkpoint."""
    given, function = qkv(), bert
    if rest == "inductor":

        def function(q, k, v):
            return checkpoint(bert, q, k, v, use_reentrant=False)

    torch._dynamo.reset()
    both = lambda *given: (function(*given), function(*given))  # noqa: E731
    out, other = torch.compile(both, backend="effattn", options={"rest": rest})(*given)
    assert (out - other).abs().max() > 0.01  # each call has its own seed
    weights = torch.randn_like(out)
    (of_value,) = torch.autograd.grad((out * weights).sum(), given[2:])
    assert_close((of_value * given[2]).sum(), (out * weights).sum(), 1e-4)


def test_the_mean_of_gradients_is_that_without_dropout():
    fast, given = fast_bert(), qkv()
    weights = torch.randn(2, 3, N, 8, generator=torch.Generator().manual_seed(3))

    def gradients(function) -> torch.Tensor:
        out = function(*given)
        return torch.cat([x.detach().flatten() for x in (out, *torch.autograd.grad((out * weights).sum(), given))])

    torch.manual_seed(4)
    found = torch.stack([gradients(fast) for _ in range(200)])
    scores = lambda q, k: (q @ k.mT / 8**0.5 + additive(PAD)).softmax(-1)  # noqa: E731
    error = found.mean(0) - gradients(lambda q, k, v: scores(q, k) @ v)
    error /= found.std(0) / 200**0.5 + 1e-4
    assert error.abs().mean() < 1.0
    assert error.abs().max() < 6.0
