"""SmolLM2-135M-Instruct from its wheel: the whole model, real text."""

from __future__ import annotations

import pytest
import torch

import effattn

models = pytest.importorskip("effattn.models")


@pytest.fixture(scope="module")
def smollm2():
    return models.load_smollm2()


@pytest.fixture(scope="module")
def ids(smollm2):
    return models.standard_library_text(smollm2[1], 192)


def test_thirty_sites_are_found_and_read(smollm2, ids):
    with torch.no_grad():
        report = effattn.explain(smollm2[0], ids, use_cache=False)
    assert [site.layer for site in report.sites] == list(range(30))
    assert {(site.predicate, site.form, site.found_as) for site in report.sites} == {("k <= q", "exact", "sdpa")}
    assert report.missed == []
    assert "30 of 30" in str(report)


def test_logits_and_greedy_text(smollm2):
    model, tokenizer = smollm2
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids

    def greedy(function):
        with torch.no_grad():
            out = function(prompt)
            first, found = out.logits, []
            for _ in range(64):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                found.append(int(token))
                out = function(token, past_key_values=out.past_key_values)
        return first, found

    logits, text = greedy(model)
    torch._dynamo.reset()
    fast_logits, fast_text = greedy(torch.compile(model, backend="effattn", options={"rest": "eager", "strict": True}))
    assert (logits - fast_logits).abs().max() < 1e-3
    assert fast_text == text


def test_padding_and_the_default_policy(smollm2):
    model, tokenizer = smollm2
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["Hello", "A much longer sentence than the first one"], return_tensors="pt", padding=True)
    with torch.no_grad():
        torch._dynamo.reset()
        fast = torch.compile(model, backend="effattn", options={"rest": "eager", "strict": True, "verify": True})
        difference = fast(**batch, use_cache=False).logits - model(**batch, use_cache=False).logits
    assert difference.abs().max() < 1e-3


@pytest.mark.slow  # tests/evaluate has a smaller model
def test_evaluate(smollm2):
    from effattn.evaluate import evaluate

    rule = {"forms": ["power"], "params": {"power": {"block": 16, "window": 32, "sinks": 16}}}
    small = {"schema": 1, "name": "small", "rule": [{**rule, "layers": "1-"}]}
    done = evaluate(*smollm2, ["exact", small], lengths=[192], tasks=["errors"])
    assert [site.layer for site in done.sites] == list(range(30))
    for site in done.sites:
        exact, power = site.forms
        assert exact.error < 1e-5
        assert (power.density < 1) == (site.layer > 0)
        assert power.mass <= power.oracle_mass + 1e-6
    assert min(site.forms[1].mass for site in done.sites) < 0.99
