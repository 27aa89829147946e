"""``effattn explain``: what is loaded, what is handed on, what is printed. The report itself is a stand-in here."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest
import torch
from comparing import assert_close
from typer.testing import CliRunner

import effattn
from effattn.cli import models
from effattn.cli.main import app
from effattn.policy import Policy

CODE = """
import torch

class Model(torch.nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale

def build():
    return Model(), (torch.ones(2),), {"scale": 2.0}

def short():
    return Model(), [torch.ones(2)]

def alone():
    return Model()

def wrong():
    return 5

def swapped():
    return (torch.ones(2),), Model()

def fails():
    raise RuntimeError("no such file")

constant = 3
"""


class Report:
    def __init__(self, **body):
        self.body = {"sites": [], "missed": []} | body

    def __str__(self):
        return "30 of 30 sites"

    def to_dict(self):
        return self.body

    def to_html(self, path):
        path.write_text("<html>")

    def graph(self, before):
        if self.body.get("graphs") == []:
            raise IndexError("the model has 0 graphs")
        return "def before" if before else "def after"


@pytest.fixture
def calls(monkeypatch):
    """What ``effattn.explain`` is called with; set ``calls.report`` to change what it answers."""
    seen = types.SimpleNamespace(report=Report())

    def explain(model, *args, policy=None, **kwargs):
        seen.model, seen.args, seen.policy, seen.kwargs = model, args, policy, kwargs
        seen.grad, seen.training = torch.is_grad_enabled(), model.training
        if isinstance(seen.report, Exception):
            raise seen.report
        return seen.report

    monkeypatch.setattr(effattn, "explain", explain, raising=False)
    return seen


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "users_model.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "users_model", None)
    del sys.modules["users_model"]
    return tmp_path


def run(*args, code=0):
    result = CliRunner().invoke(app, ["explain", *[str(arg) for arg in args]])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("place", ["users_model", "users_model.py"])
def test_users_code(calls, code, place):
    assert run(f"{place}:build", "--policy", "power").stdout == "30 of 30 sites\n"
    assert type(calls.model).__name__ == "Model"
    assert calls.kwargs == {"scale": 2.0}
    assert torch.equal(calls.args[0], torch.ones(2))
    assert calls.policy == Policy.named("power")
    assert (calls.grad, calls.training) == (False, False)


def test_train_asks_for_gradients(calls, code):
    run("users_model:short", "--train")
    assert (calls.grad, calls.training, calls.kwargs) == (True, True, {})


def test_what_is_printed(calls, code, tmp_path):
    calls.report = Report(seconds={"match": 0.5})
    assert json.loads(run("users_model:build", "--json").stdout)["seconds"] == {"match": 0.5}
    assert run("users_model:build", "--graph", "before").stdout == "def before\n"
    assert run("users_model:build", "--graph", "after").stdout == "def after\n"
    result = run("users_model:build", "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "<html>"
    assert result.stdout == "30 of 30 sites\n"
    calls.report = Report(graphs=[])
    assert "error: the model has 0 graphs" in run("users_model:build", "--graph", "after", code=1).stderr
    assert "cannot write" in run("users_model:build", "--html", tmp_path / "no" / "page.html", code=2).stderr


@pytest.mark.parametrize(
    ("body", "exit_code"),
    [
        ({}, 0),
        ({"missed": [{"name": "softmax"}]}, 1),
        ({"sites": [{"candidates": [{"form": "power", "accepted": False}]}]}, 1),
        ({"sites": [{"candidates": [{"form": "power", "accepted": True}]}]}, 0),
        ({"sites": [{}]}, 0),
        ({"outside": [{"called": "softmax"}]}, 1),
        ({"graphs": [{"failure": "KeyError: oops"}, {}]}, 1),
        ({"graphs": [{"failure": None}]}, 0),
        ({"policy": {"shortcomings": ["layers 9 match nothing"]}}, 1),
    ],
)
def test_strict(calls, code, body, exit_code):
    calls.report = Report(**body)
    run("users_model:build")
    run("users_model:build", "--strict", code=exit_code)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_model:biuld", "no function 'biuld'; did you mean 'build'?"),
        ("users_model:constant", "no function 'constant'"),
        ("users_model:fails", "users_model:fails failed: RuntimeError: no such file"),
        ("users_model:wrong", "must return (model, args, kwargs): a callable, a tuple and a dict; got int"),
        ("users_model:swapped", "got (tuple, Model)"),
        ("users_model:a b", "the name of a function"),
        ("no_such_module:build", "cannot import no_such_module: ModuleNotFoundError"),
        ("nowhere.py:build", "there is no file nowhere.py"),
        (":build", "before the colon"),
        ("users_model.py", "is a file"),
        ("./nowhere", "there is no directory ./nowhere"),
        ("smolm2", "did you mean 'smollm2'?"),
    ],
)
def test_what_cannot_be_loaded(calls, code, name, message):
    assert message in " ".join(run(name, code=2).stderr.split())


def test_a_model_that_does_not_run(calls, code):
    calls.report = ValueError("shapes differ\nand more")
    assert "the model did not run: ValueError: shapes differ" in run("users_model:alone", code=1).stderr


def test_a_wrong_policy_is_told_before_anything_is_loaded(calls, code):
    assert "did you mean 'power'" in run("no_such_module:x", "--policy", "powr", code=2).stderr


# --- models of transformers, made here -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=64,
    )
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_directory_with_nothing_but_a_config(calls, folder):
    result = run(folder, "--length", 65, "--batch", 2, "--attention", "eager", "--mask")
    assert type(calls.model).__name__ == "LlamaForCausalLM"
    assert calls.model.config._attn_implementation == "eager"
    assert calls.kwargs["input_ids"].shape == calls.kwargs["attention_mask"].shape == (2, 65)
    assert calls.kwargs["use_cache"] is False
    assert "no weights: random ones are used" in result.stderr
    assert "65 tokens are more than the 64" in result.stderr
    calls.model(*calls.args, **calls.kwargs)  # it runs


def test_a_directory_with_weights(calls, folder):
    import transformers

    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    result = run(folder, "--length", 8)
    assert result.stderr == "" or "note" not in result.stderr
    assert type(calls.model).__name__ == "LlamaForCausalLM"
    assert_close(calls.model.lm_head.weight, model.lm_head.weight)
    assert "attention_mask" not in calls.kwargs


@pytest.mark.parametrize("kind", ["Bert", "T5"])
def test_encoders(calls, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "Bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32},
        "T5": {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8, "d_ff": 32},
    }
    heads = {"Bert": "BertForMaskedLM", "T5": "T5ForConditionalGeneration"}
    config = getattr(transformers, f"{kind}Config")(vocab_size=97, architectures=[heads[kind]], **sizes[kind])
    config.save_pretrained(tmp_path)
    run(tmp_path, "--length", 8)
    assert type(calls.model).__name__ == f"{kind}Model"
    calls.model(**calls.kwargs)


def test_a_broken_directory(calls, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{")
    message = run(tmp_path, code=2).stderr
    assert re.search(r"cannot load a model from the directory .*config\.json", " ".join(message.split()))


def test_without_a_network(calls, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def offline(*_args, **_kwargs):
        raise OSError("We couldn't connect to the hub.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    message = " ".join(run("meta/llama", code=2).stderr.split())
    assert "cannot load 'meta/llama'" in message
    assert "couldn't connect" in message
    assert "give a model directory, or a name that needs none: smollm2" in message


def test_smollm2_by_name(calls, monkeypatch, folder):
    import transformers

    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    stand_in = types.SimpleNamespace(load_smollm2=lambda: (model, None))
    monkeypatch.setitem(sys.modules, "effattn.models", stand_in)
    run("smollm2", "--length", 8, "--attention", "eager")
    assert calls.model is model
    assert model.config._attn_implementation == "eager"


def test_the_example_is_the_same_every_time(folder):
    first = models.load(str(folder), length=8, batch=1, attention=None, mask=False)
    second = models.load(str(folder), length=8, batch=1, attention=None, mask=False)
    assert torch.equal(first.kwargs["input_ids"], second.kwargs["input_ids"])
