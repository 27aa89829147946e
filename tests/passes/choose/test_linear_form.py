"""Softmax sites as linear attention: refused unless a policy brings weights or says what it accepts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from torch import nn

from effattn.compiler.backend import effattn
from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.errors import FormRefused, OptionError
from effattn.functional import attention
from effattn.ir.refusal import Why
from effattn.ir.site import Layout
from effattn.lowering.forms import FORMS
from effattn.lowering.forms.feature_maps import FEATURE_MAPS
from effattn.runtime.ops.feature_attention import feature_attention
from effattn.runtime.reference.hybrid import hybrid
from effattn.runtime.reference.linear import quadratic

B, H, KV, N, D = 2, 4, 2, 40, 16


def qkv(kv_heads=KV, length=N):
    torch.manual_seed(0)
    return [torch.randn(B, heads, length, D) for heads in (H, kv_heads, kv_heads)]


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def policy(**params):
    return {"rule": [{"forms": ["linear"], "params": {"linear": params}}]}


def run(function, *args, **params):
    return compiled(function, *args, policy=policy(**params), strict=False)


def refused(report):
    (site,) = report.sites
    assert site.form == "exact"
    (candidate,) = (one for one in site.candidates if one["form"] == "linear")
    assert not candidate["accepted"]
    return candidate


def rules(candidate):
    return [Why(rule) for rule in candidate["rules"]]


def test_without_weights_or_tolerance_it_is_refused_with_what_it_would_cost():
    report, out = run(causal, *qkv())
    (reason,) = refused(report)["reasons"]
    assert "1,539 (T2R) or 2,448 (Hedgehog)" in reason
    assert "params.linear.weights" in reason
    assert_close(out, causal(*qkv()))
    with pytest.raises(FormRefused, match="perplexity is then 1,539") as caught:
        compiled(causal, *qkv(), policy=policy(), strict=True)
    assert [refusal.rule for refusal in caught.value.refusals] == [Why.NOT_ACCEPTED]


@pytest.mark.parametrize("name", ["elu_plus_one", "relu"])
def test_a_declared_tolerance_is_enough_for_maps_without_weights(name):
    report, out = run(causal, *qkv(), tolerance=1.0, feature_map=name)
    (site,) = report.sites
    assert (site.form, site.exact) == ("linear", False)
    assert site.kernel == "effattn::linear, after the feature maps"
    assert_close(out, feature_attention(*qkv(), name))
    assert "linear" in report.stanza


def as_defined(q, k, v, name="elu_plus_one", gamma=0.1, scale=D**-0.5, **window):
    phi = FEATURE_MAPS[name]
    return hybrid(q, k, v, phi(q), phi(k), gamma, scale=scale, **window).float()


@pytest.mark.parametrize("lengths", [(), (2,)])
@pytest.mark.parametrize("terraced", [False, True])
def test_a_window_with_a_softmax(terraced, lengths):
    params = {"tolerance": 1.0, "window": 8, "terraced": terraced, "gamma": 0.3}
    report, out = compiled(together, torch.cat(qkv(), 1), policy=policy(**params), lengths=lengths)
    (site,) = report.sites
    assert (site.form, site.exact) == ("linear", False)
    assert site.kernel == "effattn::window_linear, after the feature maps"
    assert_close(out, as_defined(*qkv(), window=8, terraced=terraced, gamma=0.3))


def test_the_scale_of_the_window_is_the_author_s():
    def scaled(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.7)

    def divided(q, k, v):
        scores = q @ k.mT / 3.0 + torch.full((N, N), -torch.inf).triu(1)
        return scores.softmax(-1) @ v

    for function, scale, heads in ((scaled, 0.7, KV), (divided, 1 / 3, H)):
        report, out = run(function, *qkv(heads), tolerance=1.0, window=8)
        assert report.sites[0].form == "linear"
        assert_close(out, as_defined(*qkv(heads), window=8, scale=scale))


def test_gradients_through_a_window():
    given = [tensor.requires_grad_() for tensor in qkv()]
    _, out = run(causal, *given, tolerance=1.0, window=8)
    wanted = as_defined(*given, window=8)
    assert_close(out, wanted)
    grad = torch.randn_like(out)
    found = [torch.autograd.grad(one, given, grad) for one in (out, wanted)]
    for got, want in zip(*found, strict=True):
        assert_close(got, want, 1e-4)


def test_both_directions():
    report, out = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *qkv(H), tolerance=1.0)
    assert report.sites[0].form == "linear"
    assert_close(out, feature_attention(*qkv(H), "elu_plus_one", causal=False))


def window(q, k, v):
    place = torch.arange(N)
    near = (place[:, None] - place >= 0) & (place[:, None] - place < 8)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)


def padded(q, k, v):
    keep = torch.ones(B, 1, N, N, dtype=torch.bool).tril() & (v[:, :1, :, 0] != 7.0)[:, :, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)


def both_directions(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def capped(q, k, v):
    scores = (q @ k.repeat_interleave(H // KV, 1).mT / 20.0).tanh() * 20.0 + torch.full((N, N), -torch.inf).triu(1)
    return scores.softmax(-1) @ v.repeat_interleave(H // KV, 1)


def one_row(q, k, v):
    return F.scaled_dot_product_attention(q[:, :, :1], k, v, enable_gqa=True)


@pytest.mark.parametrize(
    ("function", "params", "rule"),
    [
        (window, {"tolerance": 1.0}, Why.WHOLE),
        (padded, {"tolerance": 1.0}, Why.DATA_MASK),
        (one_row, {"tolerance": 1.0}, Why.PREFILL),
        (one_row, {"tolerance": 1.0, "window": 8}, Why.PREFILL),
        (both_directions, {"tolerance": 1.0, "window": 8}, Why.CAUSAL_WINDOW),
        (capped, {"tolerance": 1.0, "window": 8}, Why.PLAIN_WINDOW),
        (causal, {"tolerance": 1.0, "feature_map": "hedgehog"}, Why.TRAINED_MAP),
        (causal, {"weights": "absent.safetensors", "feature_map": "hedgehog"}, Why.LAYER),
    ],
)
def test_refusals(function, params, rule):
    report, _ = run(function, *qkv(), **params)
    assert rule in rules(refused(report))


def together(x):
    return causal(*x.split([H, KV, KV], 1))


def least(length, **rule):
    return {"rule": [{"forms": ["linear"], "min_length": length, "params": {"linear": {"tolerance": 1.0}}, **rule}]}


def test_a_least_length_is_decided_when_a_graph_has_one_length():
    x = torch.cat(qkv(), 1)
    for length, form in ((8, "linear"), (N, "linear"), (N + 1, "exact")):
        report, out = compiled(together, x, policy=least(length))
        assert report.sites[0].form == form
        assert_close(out, feature_attention(*qkv(), "elu_plus_one") if form == "linear" else together(x))
    assert rules(refused(report)) == [Why.SHORT]


def test_a_least_length_is_refused_where_a_graph_has_several():
    report, _ = compiled(together, torch.cat(qkv(), 1), policy=least(8), lengths=(2,), strict=False)
    assert rules(refused(report)) == [Why.SEVERAL_LENGTHS]


class TestTheCheapest:
    """``auto`` weighs linear where the length is known."""

    @pytest.fixture(autouse=True)
    def _an_h100(self, monkeypatch):
        from effattn.lowering.device import device_named
        from effattn.passes.choose import cheapest

        monkeypatch.setattr(cheapest, "device_named", lambda name: device_named("NVIDIA H100 80GB HBM3"))

    def run(self, length, lengths=(), strict=True, heads=32, **rule):
        params = {"linear": {"tolerance": 1.0}, "window": {"window": 1024}}
        asked = {"rule": [{"forms": ["auto", "linear", "window"], "params": params, **rule}]}

        def function(x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

        x = torch.randn(1, heads, length, D, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            report, out = compiled(function, x, policy=asked, lengths=lengths, strict=strict)
        return x, report.sites[0], out

    def test_it_is_taken_where_it_is(self):
        x, site, out = self.run(2048)
        assert site.form == "linear"
        assert "asks for the cheapest: linear at the 2,048 keys of this graph" in site.reason
        assert "accepting an error of 1" in site.reason
        assert_close(out, feature_attention(x, x, x, "elu_plus_one"))

    def test_it_is_not_where_it_is_not(self):
        x, site, out = self.run(48)
        assert site.form != "linear"
        assert "linear is not the cheapest at the 48 keys of this graph (predicted: " in site.reason
        assert_close(out, F.scaled_dot_product_attention(x, x, x, is_causal=True))

    def test_it_is_refused_where_lengths_vary_and_below_min_length(self):
        _, site, _ = self.run(2048, lengths=(2,), strict=False)
        assert site.form != "linear"
        assert [rules(one) for one in site.candidates if one["form"] == "linear"] == [[Why.SEVERAL_LENGTHS]]
        _, site, _ = self.run(2048, min_length=4096)
        assert site.form != "linear"
        assert [rules(one) for one in site.candidates if one["form"] == "linear"] == [[Why.SHORT]]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(H * D, (H + 2 * KV) * D)

    def forward(self, x):
        parts = self.project(x).view(B, -1, H + 2 * KV, D).transpose(1, 2).split([H, KV, KV], 1)
        return x + causal(*parts).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_weights_by_layer(tmp_path, rest):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(1)
    shapes = FEATURE_MAPS["hedgehog"].shapes
    weights = {}
    for layer in range(2):
        for side, heads in (("query", H), ("key", KV)):
            weights[f"layers.{layer}.{side}.weight"] = torch.randn(shapes(heads, D)["weight"]) / 4
    path = tmp_path / "maps.safetensors"
    safetensors.save_file(weights, path)
    model, x = Model(), torch.randn(B, N, H * D)
    given = {"policy": policy(feature_map="hedgehog", weights=str(path)), "strict": True, "rest": rest}
    torch._dynamo.reset()
    with collect.listening() as heard, torch.no_grad():
        out = torch.compile(model, backend=lambda gm, args: effattn(gm, args, options=given))(x)
    report = heard.report(Options.read(given))
    assert [site.form for site in report.sites] == ["linear", "linear"]
    assert str(path) in report.sites[0].reason
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            q, k, v = layer.project(x).view(B, -1, H + 2 * KV, D).transpose(1, 2).split([H, KV, KV], 1)
            sides = ({"weight": weights[f"layers.{number}.{side}.weight"]} for side in ("query", "key"))
            x = x + feature_attention(q, k, v, "hedgehog", *sides).transpose(1, 2).flatten(2)
    assert_close(out, x)

    path.write_bytes(b"broken")
    torch._dynamo.reset()
    with collect.listening() as heard, torch.no_grad():
        torch.compile(model, backend=lambda gm, args: effattn(gm, args, options={**given, "strict": False}))(
            torch.randn(B, N, H * D)
        )
    assert f"{path}: not a safetensors file" in heard.graphs[0].sites[0].reason


@pytest.mark.parametrize("name", ["hedgehog", "elu_plus_one"])
def test_factors_of_the_window_by_layer(tmp_path, name):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(1)
    weights = {f"layers.{layer}.window.factor": torch.randn(H) for layer in range(2)}
    for layer in range(2) if name == "hedgehog" else ():
        for side, heads in (("query", H), ("key", KV)):
            shape = FEATURE_MAPS[name].shapes(heads, D)["weight"]
            weights[f"layers.{layer}.{side}.weight"] = torch.randn(shape) / 4
    path = tmp_path / "maps.safetensors"
    safetensors.save_file(weights, path)
    model, x = Model(), torch.randn(B, N, H * D)

    def compiled_model(strict):
        given = {"policy": policy(feature_map=name, weights=str(path), window=8), "strict": strict, "rest": "eager"}
        torch._dynamo.reset()
        with collect.listening() as heard, torch.no_grad():
            out = torch.compile(model, backend=lambda gm, args: effattn(gm, args, options=given))(x)
        return heard.report(Options.read(given)), out

    report, out = compiled_model(True)
    assert [site.form for site in report.sites] == ["linear", "linear"]
    expected = x
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            parts = layer.project(expected).view(B, -1, H + 2 * KV, D).transpose(1, 2).split([H, KV, KV], 1)
            maps = [{"weight": weights[f"layers.{number}.{side}.weight"]} if name == "hedgehog" else {}
                    for side in ("query", "key")]  # fmt: skip
            gamma = torch.sigmoid(weights[f"layers.{number}.window.factor"])
            here = feature_attention(*parts, name, *maps, window=8, gamma=gamma)
            expected = expected + here.transpose(1, 2).flatten(2)
    assert_close(out, expected)

    weights["layers.1.window.factor"] = torch.zeros(H + 1)
    safetensors.save_file(weights, path)
    report, _ = compiled_model(False)
    assert [site.form for site in report.sites] == ["linear", "exact"]
    assert "'layers.1.window.factor' has shape [5], the window needs [4]" in report.sites[1].reason


@pytest.mark.parametrize(("q_len", "k_len"), [(40, 40), (7, 40), (40, 7), (1, 40)])
def test_as_a_function_with_a_window(q_len, k_len):
    q, k, v = torch.randn(B, H, q_len, D), torch.randn(B, KV, k_len, D), torch.randn(B, KV, k_len, 8)
    for scale in (None, 0.5):
        out = attention(q, k, v, form="linear", scale=scale, window=8, gamma=0.2)
        assert_close(out, as_defined(q, k, v, window=8, gamma=0.2, scale=scale or D**-0.5))


@pytest.mark.parametrize(("q_len", "k_len"), [(40, 40), (7, 40), (40, 7), (1, 40)])
def test_as_a_function(q_len, k_len):
    q, k, v = torch.randn(B, H, q_len, D), torch.randn(B, KV, k_len, D), torch.randn(B, KV, k_len, 8)
    out = attention(q, k, v, form="linear", scale=0.5)
    phi = FEATURE_MAPS["elu_plus_one"]
    rows = max(q_len - k_len, 0)
    padding = torch.zeros(B, H, max(k_len - q_len, 0), D)
    whole = torch.cat([padding, phi(q[:, :, rows:] * 0.5)], 2)
    expected, _ = quadratic(whole, phi(k), v, normalised=True, eps=1e-6)
    expected = expected[:, :, max(k_len - q_len, 0) :]
    assert_close(out[:, :, rows:], expected.float())
    assert (out[:, :, :rows] == 0).all()


def test_what_a_wrong_call_gets():
    with pytest.raises(OptionError, match="unknown feature map 'elu'"):
        attention(*qkv(), form="linear", feature_map="elu")
    for wrong, rule in (
        ({"feature_map": "t2r"}, Why.TRAINED_MAP),
        ({"window": 8, "causal": False}, Why.CAUSAL_WINDOW),
    ):
        with pytest.raises(FormRefused) as caught:
            attention(*qkv(), form="linear", **wrong)
        assert [refusal.rule for refusal in caught.value.refusals] == [rule]
    for wrong in ({"window": -1}, {"window": 5000}, {"gamma": 0.0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            attention(*qkv(), form="linear", **wrong)


def test_it_costs_less_than_exact_from_a_few_hundred_tokens_on():
    from effattn.ir import expr
    from effattn.ir.attention import AttentionSpec
    from effattn.ir.site import Site

    sizes = Layout(1, 32, 8, 4096, 4096, 128, 128)
    rest = {"position": expr.q, "device": "cuda"}
    spec = AttentionSpec(expr.s, expr.k <= expr.q, empty_rows="never")
    site = Site("a", "sdpa", "prefill", sizes, sizes, spec, **rest, dtype="bfloat16",
                needs_grad=False, output_layout="bhnd")  # fmt: skip
    linear, exact = (FORMS[name].cost(site, FORMS[name].params()) for name in ("linear", "exact"))
    assert linear.attention.at(128, 128)[0] > exact.attention.at(128, 128)[0]
    assert linear.attention.at(4096, 4096)[0] < exact.attention.at(4096, 4096)[0] / 8
