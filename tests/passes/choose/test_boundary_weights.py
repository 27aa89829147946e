"""DHSA with a trained predictor on the whole road: weights by layer through a policy, and why a site stays exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from boundary_cases import random_tensors, save
from comparing import assert_close
from compiled import compiled
from torch import nn

import effattn
from effattn.compiler.backend import effattn as backend
from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.errors import PolicyError
from effattn.ir.refusal import Why

pytest.importorskip("safetensors.torch")

B, H, KV, N, D = 2, 4, 2, 90, 8
PARAMS = {"block": 16, "unit": 1, "budget": 40, "chunks": "trained", "logit": 0.2, "local": 16, "sinks": 4}


def policy(path, **rule):
    return {"rule": [{"forms": ["dhsa"], "params": {"dhsa": {**PARAMS, "weights": str(path)}}, **rule}]}


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(H * D, (H + 2 * KV) * D)

    def split(self, x):
        return self.project(x).view(B, -1, H + 2 * KV, D).transpose(1, 2).split([H, KV, KV], 1)

    def forward(self, x):
        return x + causal(*self.split(x)).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def run(model, x, path, strict, rest="eager"):
    given = {"policy": policy(path), "strict": strict, "rest": rest}
    torch._dynamo.reset()
    with collect.listening() as heard:
        out = torch.compile(model, backend=lambda gm, args: backend(gm, args, options=given))(x)
    return heard.report(Options.read(given)), out


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_weights_by_layer(tmp_path, rest):
    torch.manual_seed(1)
    tensors = [random_tensors(seed=layer) for layer in range(2)]
    path = tmp_path / "both.safetensors"
    save(path, {f"layers.{layer}.": one for layer, one in enumerate(tensors)})
    model, x = Model(), torch.randn(B, N, H * D)
    report, out = run(model, x, path, True, rest)
    assert [site.form for site in report.sites] == ["dhsa", "dhsa"]
    with torch.no_grad():
        for layer, one in zip(model.layers, tensors, strict=True):
            single = save(tmp_path / "one.safetensors", {"all.": one})
            here = effattn.attention(*layer.split(x), form="dhsa", **PARAMS, weights=single)
            x = x + here.transpose(1, 2).flatten(2)
    assert_close(out, x, 1e-4)


def test_a_layer_without_weights_stays_exact_and_says_so(tmp_path):
    path = tmp_path / "first.safetensors"
    save(path, {"layers.0.": random_tensors()})
    report, _ = run(Model(), torch.randn(B, N, H * D), path, False)
    assert [site.form for site in report.sites] == ["dhsa", "exact"]
    assert f"{path}: holds no predictor for layer 1" in report.sites[1].reason


def padded(q, k, v):
    keep = torch.ones(B, 1, N, N, dtype=torch.bool).tril() & (v[:, :1, :, 0] != 7.0)[:, :, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)


def documents(q, k, v):
    ids = (v[:, :1, :, 0] > 7.0).cumsum(-1)
    keep = torch.ones(N, N, dtype=torch.bool).tril() & (ids[..., :, None] == ids[..., None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)


@pytest.mark.parametrize(
    ("function", "dim", "prefix", "rule"),
    [
        (causal, D, "layers.0.", Why.PREDICTOR),
        (causal, 16, "all.", Why.PREDICTOR),
        (causal, D, None, Why.PREDICTOR),
        (padded, D, "all.", Why.DATA_MASK),
        (documents, D, "all.", Why.DATA_MASK),
    ],
)
def test_refusals(tmp_path, function, dim, prefix, rule):
    path = tmp_path / "cut.safetensors"
    if prefix is not None:
        save(path, {prefix: random_tensors()})
    given = [torch.randn(B, heads, N, dim) for heads in (H, KV, KV)]
    with torch.no_grad():
        report, out = compiled(function, *given, policy=policy(path), strict=False)
        assert_close(out, function(*given))
    (site,) = report.sites
    assert site.form == "exact"
    assert [rule] == [Why(one) for considered in site.candidates for one in considered["rules"]]


def test_one_file_for_all_layers_needs_no_number_of_a_layer(tmp_path):
    path = save(tmp_path / "cut.safetensors", {"all.": random_tensors()})
    given = [torch.randn(B, heads, N, D) for heads in (H, KV, KV)]
    with torch.no_grad():
        report, out = compiled(causal, *given, policy=policy(path))
    assert report.sites[0].form == "dhsa"
    assert_close(out, effattn.attention(*given, form="dhsa", **PARAMS, weights=path))


def test_weights_without_their_chunks_are_a_mistake():
    with pytest.raises(PolicyError, match="belong together"):
        effattn.Policy.of({"rule": [{"forms": ["dhsa"], "params": {"dhsa": {"weights": "cut.safetensors"}}}]})


def test_a_file_that_changes_is_read_again(tmp_path):
    """A plan says what is in the file, so it is not kept by the file's name."""
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    q, k, v = Model().layers[0].split(torch.randn(B, N, H * D))
    found = []
    for seed in range(2):
        save(path, {"all.": random_tensors(seed=seed)})
        with torch.no_grad():
            found.append(effattn.attention(q, k, v, form="dhsa", **PARAMS, weights=str(path)))
    assert not torch.equal(*found)
