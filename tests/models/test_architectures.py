"""Architectures of transformers: every site found, read as what it is, verified, and the output unchanged."""

from __future__ import annotations

import pytest
import torch
from architectures import build, inputs
from comparing import assert_close

import effattn

CAUSAL, WINDOW = "k <= q", "k <= q & q - k < 8"
# architecture, attention, predicates without a mask from the caller (padding adds "& padding[b, k]")
CASES = [
    ("llama", "sdpa", {CAUSAL}),
    ("llama", "eager", {CAUSAL}),
    ("gpt2", "sdpa", {CAUSAL}),
    ("gpt2", "eager", {CAUSAL}),
    ("opt", "eager", {CAUSAL}),
    ("gpt_neox", "eager", {CAUSAL}),
    ("phi3", "sdpa", {CAUSAL}),
    ("qwen3", "sdpa", {CAUSAL}),
    ("mistral", "sdpa", {WINDOW}),
    ("mistral", "eager", {WINDOW}),
    ("gemma2", "eager", {CAUSAL, WINDOW}),
    ("bloom", "eager", {CAUSAL}),
    ("mpt", "eager", {CAUSAL}),
    ("falcon", "sdpa", {CAUSAL}),
    ("bert", "sdpa", {"true"}),
    ("bert", "eager", {"true"}),
    ("distilbert", "sdpa", {"true"}),
    ("vit", "eager", {"true"}),
    ("t5", "eager", {"true", CAUSAL}),
]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("name", "attention", "predicates"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_found_read_and_unchanged(name, attention, predicates, padded):
    if padded and name == "vit":
        pytest.skip("images have no padding")
    model, given = build(name, attention), inputs(name, padded)
    with torch.no_grad():
        expected = model(**given)[0]
        torch._dynamo.reset()
        report = effattn.explain(model, options={"strict": True, "verify": True}, **given)
        actual = torch.compile(model, backend="effattn", options={"rest": "eager", "strict": True})(**given)[0]
    assert report.missed == []
    assert len(report.sites) == (6 if name == "t5" else 2)
    if padded and name != "t5":
        predicates = {f"{p} & padding[b, k]" if p != "true" else "padding[b, k]" for p in predicates}
    if name != "t5" or not padded:
        assert {site.predicate for site in report.sites} == predicates
    assert_close(actual, expected)


def test_scores_are_read():
    with torch.no_grad():
        gemma = effattn.explain(build("gemma2", "eager"), **inputs("gemma2", False))
        bloom = effattn.explain(build("bloom", "eager"), **inputs("bloom", False))
    assert all("50*tanh(" in site.score for site in gemma.sites)
    assert all("k*slopes[h]" in site.score for site in bloom.sites)


@pytest.mark.parametrize("name", ["t5", "beit", "swinv2", "bert", "gemma2", "bloom"])
def test_gradients_of_all_parameters(name):
    """Tables of relative positions and a learned temperature among them; padding hides all keys of some queries."""
    model, given = build(name, "eager"), inputs(name, padded=True)
    grads = []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend="effattn", options={"rest": "eager", "strict": True})):
        model.zero_grad()
        out = run(**given)[0]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    report = effattn.explain(model, options={"strict": True}, **given)
    assert all(site.replaced and site.stage == "train" for site in report.sites)
    assert len(report.sites) == (6 if name == "t5" else 2)
    for parameter, wanted in grads[0].items():
        if wanted is not None:
            assert_close(grads[1][parameter], wanted, 1e-4, msg=lambda text, name=parameter: f"{name}: {text}")
