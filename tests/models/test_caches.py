"""Generation: cache writes survive, lengths grow, and nothing is compiled more often than with Inductor alone."""

from __future__ import annotations

import pytest
import torch
from architectures import llama, tokens
from comparing import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

import effattn
from effattn.compiler.backend import effattn as backend


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="effattn", options={"rest": "eager", "strict": True, "verify": True, **options})


def static_steps(function, model, steps: int = 3):
    ids = tokens(length=17)
    cache = StaticCache(config=model.config, max_cache_len=48)
    logits = [function(ids, past_key_values=cache).logits]
    logits += [function(ids[:, n : n + 1], past_key_values=cache).logits for n in range(steps)]
    state = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return logits, state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_static_cache(attention):
    model = llama(attention)
    with torch.no_grad():
        expected = static_steps(model, model)
        actual = static_steps(compiled(model), model)
    assert_close(actual, expected)


def test_static_cache_decode_reads_the_length_by_pointer():
    model = llama()
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=48)
        model(tokens(length=17), past_key_values=cache)
        report = effattn.explain(model, tokens(length=1), past_key_values=cache)
    assert {(site.predicate, site.stage) for site in report.sites} == {("k <= q + offset", "decode")}
    assert "index_copy_" in report.graph()
    assert report.graph().count("index_copy_") == report.graph(before=True).count("index_copy_")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dynamic_cache(attention):
    model, ids = llama(attention), tokens(length=17)

    def steps(function):
        out = function(ids)
        logits = [out.logits]
        for n in range(4):
            out = function(ids[:, n : n + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
        return logits

    with torch.no_grad():
        assert_close(steps(compiled(model)), steps(model))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_lengths_compile_no_more_often_than_without_us(padded):
    model = llama(num_hidden_layers=1)

    def frames(inner) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        counter.backend = inner
        fast = torch.compile(model, backend=counter)
        for batch, length in ((2, 11), (2, 19), (2, 33), (3, 40), (4, 64)):
            ids = tokens(batch, length)
            mask = torch.ones_like(ids) if padded else None
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            actual = fast(ids, attention_mask=mask, use_cache=False).logits
            assert_close(actual, expected)
        return counter.frame_count

    def ours(gm, example_inputs):
        return backend(gm, example_inputs, options={"rest": "eager", "strict": True})

    with torch.no_grad():
        assert frames(ours) <= frames("eager")


def test_generate_gives_the_same_text():
    model = llama()
    ids = tokens(1, 9)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    fast = llama()
    fast.forward = compiled(fast.forward, verify=False)
    assert torch.equal(fast.generate(ids, max_new_tokens=12, do_sample=False), expected)


def test_choice_by_length_is_made_when_the_op_runs():
    policy = {
        "schema": 1,
        "name": "from-64",
        "rule": [{"min_length": 64, "forms": ["window"], "params": {"window": {"window": 16, "sinks": 0}}}],
    }
    model = llama()
    with torch.no_grad():
        fast = compiled(model, policy=policy, verify=False)
        torch._dynamo.config.automatic_dynamic_shapes = True
        near = [(length, model(tokens(1, length), use_cache=False).logits) for length in (40, 48, 96)]
        logits = {length: fast(tokens(1, length), use_cache=False).logits for length, _ in near}
    for length, want in near[:2]:
        assert_close(logits[length], want)
    assert (logits[96] - near[2][1]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["window", "power"])
def test_decode_with_a_form_is_the_last_row_of_its_prefill(form, attention):
    """A growing cache and a fixed one: the form keeps the same keys in prefill and decode."""
    params = {"window": {"window": 16, "sinks": 4}, "power": {"block": 16, "window": 16, "sinks": 16}}
    rule = {"forms": [form], "params": {form: params[form]}, "stage": ["prefill", "decode"]}
    policy = {"schema": 1, "name": form, "rule": [rule]}
    model, ids = llama(attention), tokens(1, 70)
    with torch.no_grad():
        fast = compiled(model, policy=policy, verify=False)
        whole = fast(ids, use_cache=False).logits
        out = fast(ids[:, :67])
        for n in (67, 68, 69):
            out = fast(ids[:, n : n + 1], past_key_values=out.past_key_values)
            assert_close(out.logits[:, -1], whole[:, n])
        cache = StaticCache(config=model.config, max_cache_len=96)
        fast(ids[:, :69], past_key_values=cache)
        last = fast(ids[:, 69:70], past_key_values=cache).logits
        report = effattn.explain(model, ids[:, 69:70], past_key_values=out.past_key_values, policy=policy)
        exact = model(ids, use_cache=False).logits
    assert_close(last[:, -1], whole[:, 69])
    assert {site.form for site in report.sites} == {form}
    assert (exact - whole).abs().max() > 1e-3
