"""Checkpointed parts of a model: their attention is replaced, and they are still computed again for the gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from architectures import llama
from comparing import assert_close
from compiled import compiled
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.passes.canonicalize import checkpoints

WIDTH, HEADS, LENGTH = 16, 2, 9


class Block(nn.Module):
    """Attention whose mask is given, and a second result."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, mask, scale):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT * scale + mask).softmax(-1)
        return x + (weights @ v).transpose(1, 2).flatten(2), x.mean()


class Model(nn.Module):
    """Two checkpointed blocks with one mask, made outside of them."""

    def __init__(self, **how):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.how = {"use_reentrant": False, **how}

    def forward(self, x):
        place = torch.arange(x.shape[1])
        seen = (place <= place[:, None]) & (place[:, None] - place < 4)
        mask = torch.where(seen, 0.0, torch.finfo(x.dtype).min)
        means = 0.0
        for block in self.blocks:
            x, mean = checkpoint(block, x, mask, 0.3, **self.how)
            means = means + mean
        return x.sum() + means


def x() -> torch.Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)


def gradients(module: nn.Module, run) -> list[torch.Tensor]:
    given = x()
    return list(torch.autograd.grad(run(given), [given, *module.parameters()]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_from_outside_is_read(dynamic):
    report, _ = compiled(Model(), x(), dynamic=dynamic)
    assert report.missed == []
    assert [site.predicate for site in report.sites] == ["k <= q & q - k < 4"] * 2
    assert {site.stage for site in report.sites} == {"train"}
    assert [site.layer for site in report.sites] == [0, 1]


def test_gradients_and_the_second_computation():
    module = Model()
    expected = gradients(module, module)
    fast = torch.compile(module, backend="effattn", options={"strict": True})
    gradients(module, fast)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = gradients(module, fast)
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want)
    runs = {event.key: event.count for event in profile.key_averages()}
    assert runs["effattn::attend"] == 2 + 2  # each block: forward, and forward again
    assert runs["effattn::attend_backward"] == 2


def test_both_parts_stay_checkpoints():
    bodies = []

    def backend(gm, example_inputs):
        from effattn.compiler.pipeline import run_passes

        run_passes(gm, Options.read({"strict": True}), example_inputs)
        calls = [node for node in gm.graph.nodes if node.target is checkpoints.CHECKPOINT]
        bodies.extend(getattr(gm, node.args[0].target) for node in calls)
        assert {tuple(node.kwargs) for node in calls} == {("use_reentrant",)}
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Model(), backend=backend)(x())
    assert len(bodies) == 2
    for body in bodies:
        assert any("effattn" in str(node.target) for node in body.graph.nodes)
        assert not any("softmax" in str(node.target) for node in body.graph.nodes)


def test_selective_checkpointing_is_left_as_its_author_chose():
    keep = functools.partial(create_selective_checkpoint_contexts, lambda ctx, op, *a, **k: CheckpointPolicy.MUST_SAVE)
    report, _ = compiled(Model(context_fn=keep), x(), verify=False)
    assert report.sites == []
    assert all(missed.reason.startswith("it is inside tag_activation_checkpoint") for missed in report.missed)
    assert all("context_fn" in missed.hint for missed in report.missed)


def test_a_checkpoint_in_a_checkpoint_is_left_alone():
    inner = Block()

    def outer(x, mask):
        return checkpoint(inner, x, mask, 0.3, use_reentrant=False)[0] * 2

    def function(x):
        return checkpoint(outer, x, torch.zeros(LENGTH, LENGTH).triu(1), use_reentrant=False)

    report, _ = compiled(function, x(), verify=False)
    assert report.sites == []
    assert len(report.missed) == 1


def test_what_is_not_replaced_is_as_dynamo_made_it():
    def attention(q):
        weights = (q @ q.mT).softmax(-1)
        return weights @ q, weights

    def function(q):
        return checkpoint(attention, q, use_reentrant=False)

    def backend(gm, example_inputs):
        from effattn.compiler.pipeline import run_passes

        before = str(gm.graph)
        outcome = run_passes(gm, Options.read({"strict": True}), example_inputs)
        assert not outcome.changed
        assert len(outcome.missed) == 1
        assert [line.split("=")[-1] for line in str(gm.graph).splitlines()] == [
            line.split("=")[-1] for line in before.splitlines()
        ]
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(torch.randn(1, 2, 9, 16, requires_grad=True))


def test_transformers_gradient_checkpointing():
    module = llama("eager").train()
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 99, (2, 20), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "labels": ids, "use_cache": False, "attention_mask": torch.ones_like(ids)}
    given["attention_mask"][0, :5] = 0

    def step(run):
        return torch.autograd.grad(run(**given).loss, list(module.parameters()))

    expected = step(module)
    settings = {"strict": True, "inner_backend": "eager"}
    torch._dynamo.reset()
    with collect.listening() as heard:
        found = step(torch.compile(module, backend="effattn", options=settings))
    report = heard.report(Options.read(settings))
    assert [site.predicate for site in report.sites] == ["k <= q & padding[b, k]"] * 2
    assert report.missed == []
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want, 2e-4)
