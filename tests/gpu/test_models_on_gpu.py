"""A Hugging Face model on a GPU: CUDA graphs, caches, lengths and gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from small_llama import DEVICE, assert_as_good, build, compiled, exact, left_padding, tokens
from transformers import DynamicCache, StaticCache

GRAPHS = "reduce-overhead"
DTYPES = [torch.bfloat16, torch.float32]
IDS = ["bf16", "fp32"]


def graphs_not_captured() -> int:
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_replays_follow_their_inputs(dtype, padded):
    """Two calls record the CUDA graph; three more replay it with other tokens and another padding."""
    model = build(dtype)
    true, fast = exact(model), compiled(model, mode=GRAPHS)
    with torch.no_grad():
        for call in range(5):
            ids = tokens(2, 300, seed=call)
            given = {"attention_mask": left_padding(ids, 40 * call)} if padded else {}
            actual = fast(ids, use_cache=False, **given).logits.clone()
            eager, wanted = (function(ids, use_cache=False, **given).logits for function in (model, true))
            where = given["attention_mask"][..., None] > 0 if padded else None
            assert_as_good(actual, eager, wanted, where)
    assert graphs_not_captured() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_static_cache(dtype):
    """Prefill and decode write the cache; one recorded decode step serves two lengths of prompt."""
    model = build(dtype)
    true, fast = exact(model), compiled(model, mode=GRAPHS)
    ways = [Cached(fast, model), Cached(model, model), Cached(true, true)]
    with torch.no_grad():
        assert_as_good(*[way.first(tokens(1, 37), way.function) for way in ways])
        for n in range(4):
            assert_as_good(*[way.step(tokens(1, 1, seed=n)) for way in ways])
        assert_as_good(*[way.first(tokens(1, 150, seed=5), way.plain) for way in ways])
        for n in range(4):
            assert_as_good(*[way.step(tokens(1, 1, seed=n)) for way in ways])
        for layer in range(2):
            for name in ("keys", "values"):
                assert_as_good(*[getattr(way.cache.layers[layer], name) for way in ways])
    assert graphs_not_captured() == 0


class Cached:
    """A model, compiled or not, with a cache of its own that is kept in one place."""

    def __init__(self, function, plain):
        self.function, self.plain = function, plain
        self.cache = StaticCache(config=plain.config, max_cache_len=256)
        with torch.no_grad():
            plain(tokens(1, 2), past_key_values=self.cache)  # makes the cache's tensors, before anything is compiled

    def first(self, ids, function):
        self.cache.reset()
        return function(ids, past_key_values=self.cache).logits.clone()

    def step(self, ids):
        return self.function(ids, past_key_values=self.cache).logits.clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_dynamic_cache(dtype):
    """A cache that grows: lengths become symbolic."""
    model = build(dtype)
    true, fast = exact(model), compiled(model, dynamic=None)
    functions = [fast, model, true]
    with torch.no_grad():
        caches = [DynamicCache(config=model.config) for _ in functions]
        for ids in (tokens(2, 130), *[tokens(2, 1, seed=n) for n in range(4)]):
            outs = [function(ids, past_key_values=cache) for function, cache in zip(functions, caches, strict=True)]
            caches = [out.past_key_values for out in outs]
            assert_as_good(*[out.logits for out in outs])


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_one_compilation_serves_every_length(padded, dtype):
    model = build(dtype)
    true = exact(model)

    def over_lengths(function):
        """The logits at every length, and how many graphs Dynamo made."""
        torch._dynamo.utils.counters.clear()
        logits = []
        for batch, length in ((2, 257), (2, 17), (3, 1000), (2, 2049)):
            ids = tokens(batch, length)
            mask = left_padding(ids, length // 3) if padded else None
            logits.append(function(ids, attention_mask=mask, use_cache=False).logits)
        return logits, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    with torch.no_grad():
        actual, graphs = over_lengths(compiled(model, dynamic=True))
        torch._dynamo.reset()
        _, without_us = over_lengths(torch.compile(model, dynamic=True))
        for got, eager, wanted in zip(actual, over_lengths(model)[0], over_lengths(true)[0], strict=True):
            where = left_padding(got[..., 0], got.shape[1] // 3)[..., None] > 0 if padded else None
            assert_as_good(got, eager, wanted, where)
    assert graphs <= without_us


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_a_length_that_was_marked_stays_free_and_no_scores_are_held(dtype):
    """Grouped heads in float32 have no fast kernel of SDPA."""
    model = build(dtype)
    fast = compiled(model.model, dynamic=None)
    ids = tokens(1, 4096)
    scores = model.config.num_attention_heads * ids.shape[1] ** 2 * dtype.itemsize
    torch._dynamo.mark_dynamic(ids, 1)
    with torch.no_grad():
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            fast(ids, use_cache=False)
        assert torch.cuda.max_memory_allocated() - before < scores / 2
        fast(tokens(1, 1000), use_cache=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_gradients_with_padding(dtype, checkpointed):
    """Of every parameter; the generated kernel has a generated gradient."""
    model = build(dtype).train()
    true = exact(model).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = tokens(2, 300)
    mask = left_padding(ids, 90)
    labels = torch.where(mask > 0, ids, -100)

    def gradients(function, of):
        of.zero_grad()
        function(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in of.named_parameters()}

    actual, eager, wanted = gradients(compiled(model), model), gradients(model, model), gradients(true, true)
    for name, gradient in wanted.items():
        assert_as_good(actual[name], eager[name], gradient)


def test_a_policy_in_a_cuda_graph():
    """An approximate form: the same as itself without a graph, and not the same as exact attention."""
    policy = {
        "schema": 1,
        "name": "window-64",
        "rule": [{"min_length": 0, "forms": ["window"], "params": {"window": {"window": 64, "sinks": 4}}}],
    }
    model = build(torch.float32)
    fast, plain = compiled(model, mode=GRAPHS, policy=policy), compiled(model, policy=policy, rest="eager")
    with torch.no_grad():
        for call in range(4):
            ids = tokens(1, 300, seed=call)
            actual = fast(ids, use_cache=False).logits.clone()
            assert_close(actual, plain(ids, use_cache=False).logits, 1e-4)
            assert (actual - model(ids, use_cache=False).logits).abs().max() > 1e-3
    assert actual.device.type == DEVICE
