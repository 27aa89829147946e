"""Errors and masses of a captured attention against a plain dense computation over the whole square."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from evaluating import POWER, WINDOW, ids, llama, policy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from effattn.compiler.capture import capture
from effattn.errors import EvaluationError
from effattn.evaluate.tasks import kept
from effattn.evaluate.tasks.site_errors import lower, site_errors
from effattn.lowering.device import DEVICE_TYPES
from effattn.lowering.forms import FORMS
from effattn.policy import Policy
from effattn.runtime.selection import portable_steps, triton_steps
from effattn.runtime.selection.run import select
from effattn.runtime.targets.triton import limits

LENGTH = 200
# forms that choose by the captured queries and keys
SELECTED = [
    ("proxy", {"block": 16, "stride": 2, "least": 16, "gamma": 0.7}),
    ("dhsa", {"block": 32, "unit": 16, "share": 0.3, "local": 16, "sinks": 16}),
    ("dhsa", {"block": 16, "unit": 1, "budget": 50, "chunk": 8, "local": 16, "sinks": 4}),
]


def model(kind: str = "llama"):
    if kind == "llama":
        return llama()
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)).eval()


@functools.cache
def captured_of(kind: str = "llama"):
    return captured_from(model(kind))


def captured_from(model, batch: int = 1, **kwargs):
    """Copies of what the run handed over, queries and keys made larger so that softmax has peaks."""
    got = []

    def receive(captured):
        sharp = {"query": captured.query * 20, "key": captured.key * 20}
        got.append(type(captured)(**{**vars(captured), **sharp}))

    reached = capture(model, receive, ids(LENGTH).expand(batch, -1), use_cache=False, **kwargs)
    assert reached == len(got) == 2
    assert [captured.number for captured in got] == [0, 1]
    return got


def plainly(captured, form: str, params: dict):
    """(error, mass) by definition: whole masks and softmaxes in float64."""
    query, key, value = (t.double() for t in (captured.query, captured.key, captured.value))
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    rows, keys = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    causal = keys <= rows
    chosen, scale = FORMS[form], query.shape[-1] ** -0.5
    if chosen.select is None:
        mask = causal & chosen.reference(chosen.params(**params), rows, keys)
    else:
        mask = causal & chosen.reference(chosen.params(**params), captured.query, captured.key, causal, scale)
    scores = query @ key.transpose(-1, -2) * scale
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    dense = weights @ value
    out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    return ((out - dense).norm() / dense.norm()).item(), (weights * mask).sum(-1).mean().item(), weights, mask


def oracle_mass(weights, mask, block: int, unit: int) -> float:
    """By definition, one block of rows after another."""
    total = 0.0
    for start in range(0, LENGTH, block):
        rows = slice(start, start + block)
        for head in range(weights.shape[1]):
            masses, touched = [], 0
            for first in range(0, LENGTH, unit):
                masses.append(weights[0, head, rows, first : first + unit].sum().item())
                touched += bool(mask[min(head, mask.shape[0] - 1), rows, first : first + unit].any())
            total += sum(sorted(masses, reverse=True)[:touched])
    return total / (weights.shape[1] * LENGTH)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("form", "params"), [("power", POWER), ("window", WINDOW), *SELECTED])
def test_against_the_whole_square(kind, form, params):
    for captured in captured_of(kind):
        (found,) = site_errors(captured, [lower(captured, policy(form, **params))])
        error, mass, weights, mask = plainly(captured, form, params)
        assert error > 0.01
        assert found.error == pytest.approx(error, rel=1e-4)
        assert found.mass == pytest.approx(mass, abs=1e-5)
        assert sum(found.mass_by_head) / 4 == pytest.approx(mass, abs=1e-5)
        kept = mask.double().mean().item() * 2 * LENGTH / (LENGTH + 1)
        assert found.density == pytest.approx(kept, abs=1e-9)
        by_head = mask.view(-1, LENGTH, LENGTH)
        assert found.oracle_mass == pytest.approx(oracle_mass(weights, by_head, found.block, found.unit), abs=1e-5)
        assert found.oracle_mass >= found.mass - 1e-6


def test_a_form_without_a_softmax_is_told():
    with pytest.raises(EvaluationError, match="measure perplexity"):
        lower(captured_of()[0], policy("linear", tolerance=1.0))


def test_small_chunks_change_nothing(monkeypatch):
    captured = captured_of()[0]
    forms = [lower(captured, policy("power", **POWER)), lower(captured, policy("window", **WINDOW))]
    whole = site_errors(captured, forms)
    monkeypatch.setattr("effattn.evaluate.tasks.site_errors.SCORES", 1)
    for one, other in zip(whole, site_errors(captured, forms), strict=True):
        assert one.mass == pytest.approx(other.mass, abs=1e-6)
        assert one.oracle_mass == pytest.approx(other.oracle_mass, abs=1e-6)
        assert (one.density, one.oracle_density, one.block) == (other.density, other.oracle_density, other.block)


def test_a_window_of_everything_is_dense():
    captured = captured_of()[1]
    (found,) = site_errors(captured, [lower(captured, policy("power", block=16, window=208, sinks=0))])
    assert found.error < 1e-5
    assert found.mass == pytest.approx(1.0, abs=1e-6)
    assert (found.density, found.oracle_density) == (1.0, 1.0)


def test_below_its_length_a_form_is_dense():
    captured = captured_of()[0]
    rule = {"forms": ["power"], "min_length": LENGTH + 1, "params": {"power": POWER}}
    (found,) = site_errors(captured, [lower(captured, Policy.of({"schema": 1, "name": "later", "rule": [rule]}))])
    assert (found.density, found.mass) == (1.0, pytest.approx(1.0, abs=1e-6))


@pytest.mark.parametrize("importable", [True, False])
def test_keys_are_selected_by_what_runs_the_plan(importable, monkeypatch):
    """Without Triton that is the portable target, also on a device whose default is the Triton target."""
    steps = []
    monkeypatch.setattr(kept, "select", lambda *given: steps.append(given[-1]) or select(*given))
    monkeypatch.setattr(limits, "triton_is_importable", lambda: importable)
    monkeypatch.setitem(DEVICE_TYPES, "cpu", replace(DEVICE_TYPES["cpu"], target="triton"))
    captured = captured_of()[0]
    lowered = lower(captured, policy("proxy", **SELECTED[0][1]))
    rows = list(kept.kept_rows(captured, lowered.plan, [(0, LENGTH)]))
    assert [mask.shape for mask in rows] == [(1, 4, LENGTH, LENGTH)]
    assert steps == [triton_steps if importable else portable_steps]


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("sinks", [0, 16, 21])
def test_the_oracle_is_never_worse(block, window, sinks):
    for captured in captured_of():
        params = {"block": block, "window": block * window, "sinks": sinks}
        (found,) = site_errors(captured, [lower(captured, policy("power", **params))])
        assert found.oracle_mass >= found.mass - 1e-6


def test_padding_counts_only_rows_and_keys_that_are_there():
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :50] = 0
    captured = captured_from(model(), batch=2, attention_mask=mask)[0]
    (found,) = site_errors(captured, [lower(captured, policy("exact"))])
    assert found.mass == pytest.approx(1.0, abs=1e-6)
    assert (found.density, found.oracle_density) == (1.0, 1.0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_nothing_is_as_large_as_the_square(monkeypatch):
    monkeypatch.setattr("effattn.evaluate.tasks.site_errors.SCORES", 1)
    length, sizes = 1280, []

    def receive(captured):
        forms = [lower(captured, policy("power", **POWER)), lower(captured, policy("window", **WINDOW))]
        with Largest() as largest:
            site_errors(captured, forms)
        sizes.append(largest.elements)

    capture(model(), receive, ids(length), use_cache=False)
    assert max(sizes) <= 2 * 128 * length  # two heads of a group, one block of rows


def test_a_selector_plugs_in_at_one_place(monkeypatch):
    """A source of its own decides per head: head 0 keeps all, the others their diagonal."""
    captured = captured_of()[0]
    asked = []

    def rows(captured, plan, chunks):
        asked.append(len(chunks))
        for start, stop in chunks:
            index = torch.arange(start, stop)[:, None]
            diagonal = (index == torch.arange(captured.shape[3])).expand(1, 4, -1, -1).clone()
            diagonal[:, 0] = True
            yield diagonal

    monkeypatch.setattr(kept, "SOURCES", (kept.Source(lambda plan: plan.form == "window", rows), *kept.SOURCES))
    (found,) = site_errors(captured, [lower(captured, policy("window", **WINDOW))])
    assert asked == [1]
    assert found.mass_by_head[0] == pytest.approx(1.0, abs=1e-6)
    pairs = LENGTH * (LENGTH + 1) / 2
    assert found.density == pytest.approx((pairs + 3 * LENGTH) / (4 * pairs))


def test_what_receive_raises_ends_the_run():
    def receive(captured):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        capture(model(), receive, torch.ones(1, 8, dtype=torch.long), use_cache=False)
