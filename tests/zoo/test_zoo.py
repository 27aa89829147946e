"""A sample of the zoo: one architecture for each way to write or call attention; `make zoo` runs all of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import results
from building import build, names
from coverage import page
from settings import SETTINGS
from trial import LEFT_OUT, Executed, Trial, largest_difference, trials
from watching import watching

# architecture, attention, setting, sites (with a cache: those of the prefill and of four steps), what a predicate holds
SAMPLE = [
    ("llama", "eager", "left", 2, "padding"),
    ("gpt_oss", "eager", "whole", 2, "q - k < 8"),
    ("deepseek_v3", "sdpa", "left", 2, "padding"),
    ("clip", "eager", "whole", 4, "k <= q"),
    ("swin", "eager", "whole", 2, "true"),
    ("whisper", "sdpa", "whole", 6, "k <= q"),
    ("t5", "eager", "left", 6, "padding"),
    ("mixtral", "eager", "right", 2, "padding"),
    ("llama4_text", "eager", "whole", 2, "k <= q"),
    ("diffllama", "eager", "whole", 4, "k <= q"),
    ("llama", "sdpa", "documents", 2, "document[b, q] == document[b, k]"),
    ("gemma2", "eager", "dynamic cache", 10, "k <= q"),
    ("qwen3", "sdpa", "static cache", 10, "k <= q + offset"),
    ("t5", "sdpa", "generate", 20, "padding"),  # its encoder is no part of what is compiled
    ("llama", "flex_attention", "left", 2, "padding"),
]


@pytest.mark.parametrize(("name", "attention", "setting", "sites", "holds"), SAMPLE, ids=str)
def test_found_read_and_unchanged(name, attention, setting, sites, holds):
    (trial,) = trials(name, attention, [setting])
    assert trial.verdict == "right", trial
    assert trial.sites == trial.found == sites
    assert any(holds in predicate for predicate in trial.predicates), trial.predicates


def test_every_setting_is_in_the_sample():
    assert {setting for _, _, setting, *_ in SAMPLE} == set(SETTINGS)


@pytest.mark.parametrize(("name", "count"), [("bert", 2), ("llama", 0)])
def test_inductors_own_patterns_are_counted(name, count):
    (trial,) = trials(name, "eager", ["whole"])
    older = torch.__version__.startswith("2.11")  # its patterns do not take this BERT
    assert (trial.found, trial.inductor) == (2, 0 if older else count)


@pytest.mark.parametrize(
    ("name", "setting", "reason"),
    [
        ("vit", "left", "no tokens"),
        ("t5", "documents", "no decoder"),
        ("distilbert", "static cache", "takes no cache"),
        ("distilbert", "generate", "no model of it that generates"),
    ],
)
def test_settings_that_make_no_sense_are_told(name, setting, reason):
    (trial,) = trials(name, "eager", [setting])
    assert trial.verdict == "not run"
    assert reason in trial.not_run


def test_many_architectures_are_known():
    assert len(names()) > 300


def test_attentions_are_counted_apart_from_other_softmaxes():
    def call(x):
        routed = F.softmax(x.mean(-1), dim=-1).topk(2).values
        weights = F.dropout(torch.softmax(x @ x.mT, -1), 0.1, training=False).to(x.dtype)
        out = torch.matmul(weights.view(2, 5, 5), x) + F.scaled_dot_product_attention(x[None], x[None], x[None])[0]
        return out, routed

    function, seen = watching(call)
    function(torch.randn(2, 5, 8))
    assert (seen.sites, seen.whole, seen.softmaxes, seen.other) == (2, 1, 1, 2)
    function(torch.randn(2, 5, 8))
    assert seen.sites == 4


def test_attention_within_a_function_of_torch_is_counted_once():
    function, seen = watching(torch.nn.MultiheadAttention(8, 2).eval())
    text = torch.randn(4, 3, 8)
    function(text, text, text)
    assert seen.sites == 1


def test_watching_a_forward_leaves_what_is_generated():
    # `generate` gives position_ids only to a forward whose signature has them
    call = SETTINGS["generate"].prepare(build("gpt2", "eager"))
    function, seen = watching(call.target)
    with torch.no_grad():
        assert largest_difference(call.run(function), call.run(call.target)) == 0
    assert seen.sites == 10


def test_a_step_of_decoding_has_as_many_attentions_as_a_prefill():
    call = SETTINGS["dynamic cache"].prepare(build("llama", "eager"))
    counts = []
    function, seen = watching(call.target)

    def counted(*args, **kwargs):
        found = function(*args, **kwargs)
        counts.append(seen.sites)
        return found

    with torch.no_grad():
        call.run(counted)
    assert counts == [2, 4, 6, 8, 10]


def test_attention_in_no_graph_is_told_apart_from_what_the_backend_overlooks():
    def attend(x):
        return torch.softmax(x @ x.mT, -1) @ x

    outside = torch.compiler.disable(attend)
    of_one, x = {"sites": 1, "difference": 0.0}, torch.randn(2, 5, 8)
    executed, trial = Executed(count_inductor=False), Trial("a", "eager", "whole", **of_one)
    torch.compile(lambda x: outside(x + 1) + 1, backend=executed.backend)(x)
    executed.fill(trial)
    assert (trial.verdict, trial.refused, trial.reasons) == ("refused", 1, [f"1 x {LEFT_OUT}"])

    executed, trial = Executed(count_inductor=False), Trial("a", "eager", "whole", **of_one)
    torch.compile(attend, backend=executed.backend)(x)
    executed.fill(trial)
    assert (trial.found, trial.verdict) == (1, "right")
    for report in executed.reports:  # as if the backend had said nothing of it
        report.clear()
    executed.fill(trial)
    assert trial.verdict == "unseen"


def test_whole_numbers_have_to_be_equal():
    logits, tokens = torch.tensor([1.0, 2.0]), torch.tensor([3, 4])
    assert largest_difference([tokens, logits], [tokens, logits + 0.5]) == pytest.approx(0.2)
    assert largest_difference([tokens, logits], [tokens + 1, logits]) == float("inf")
    assert largest_difference([logits], [logits, tokens]) == float("inf")


def test_verdicts():
    right = Trial("a", "eager", "whole", sites=2, found=2, difference=0.0)
    assert right.verdict == "right"
    assert Trial("a", "eager", "whole", sites=2, found=1, difference=0.0).verdict == "unseen"
    assert Trial("a", "eager", "whole", sites=2, found=2, forms={"linear": 1}, difference=0.0).verdict == "unseen"
    assert Trial("a", "eager", "whole", sites=2, found=1, refused=1, difference=0.0).verdict == "refused"
    assert Trial("a", "eager", "whole", sites=2, found=2, difference=0.1).verdict == "differs"
    assert Trial("a", "eager", "whole", sites=2, found=2, difference=float("nan")).verdict == "differs"
    assert Trial("a", "eager", "whole", sites=2, found=2, difference=0.1, of_graphs=0.0).verdict == "right"
    assert Trial("a", "eager", "whole", sites=2, found=2, difference=0.1, of_graphs=0.1).verdict == "differs"
    infinite = {"difference": float("inf"), "sensitivity": float("inf")}
    assert Trial("a", "eager", "whole", sites=2, found=2, **infinite).verdict == "differs"
    assert Trial.of(right.to_dict()) == right


def line(*args, **fields) -> str:
    return json.dumps(Trial(*args, **fields).to_dict())


def test_runs_of_several_days_add_up(tmp_path):
    first, second, joined = (tmp_path / name for name in ("first", "second", "joined"))
    unbuilt = line("b", "eager", results.EVERY, not_run="ValueError: no")
    first.write_text(
        "\n".join([
            '{"run": {"date": "2026-01-01 10:00", "torch": "1"}}',
            line("a", "eager", "whole", sites=2, found=1, refused=1, reasons=["1 x because"], difference=0.0),
            line("a", "sdpa", "whole", error="ended with 1"),
            unbuilt,
        ])
    )  # fmt: skip
    second.write_text(
        '{"run": {"date": "2026-01-02 10:00", "torch": "2"}}\n'
        + line("a", "eager", "whole", sites=2, found=2, inductor=1, difference=0.0)
    )
    rows = results.read(first, second)
    assert [(row["attention"], row["run"]["torch"]) for row in rows] == [("eager", "2"), ("sdpa", "1"), ("eager", "1")]
    results.write(joined, rows)
    assert results.read(joined) == rows
    text = page(rows)
    assert "torch 1: 2026-01-01" in text
    assert "| a | 2 | 2 | 1 |" in text
    assert "1 of 2 architectures ran and have attention; in 0 every attention was found in every trial" in text
    assert "sdpa, whole: ended with 1" in text
    assert "because" in page(results.read(first))
    joined.write_text(first.read_text() + "\n" + line("b", "eager", "whole", sites=1, found=1, difference=0.0))
    assert [row["setting"] for row in results.read(joined) if row["name"] == "b"] == ["whole"]
