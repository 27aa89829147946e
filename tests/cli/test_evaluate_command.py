"""``effattn evaluate``: what is read, what is handed on, what is printed. The measuring itself has its own tests."""

from __future__ import annotations

import json

import pytest
from evaluating import Characters, llama
from typer.testing import CliRunner

from effattn.cli import models
from effattn.cli.main import app


@pytest.fixture
def tiny(monkeypatch):
    """The tiny model, whatever name is given; a list of what was asked for."""
    asked = []

    def language_model(name, *, device, dtype):
        asked.append((name, device, dtype))
        return llama(), Characters(), ("random weights",)

    monkeypatch.setattr(models, "language_model", language_model)
    return asked


def run(*args, code=0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def test_tables_and_the_folder(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 40)
    rule = '[[rule]]\nforms = ["power"]\n[rule.params.power]\nblock = 16\nwindow = 32\nsinks = 0\n'
    (tmp_path / "mine.toml").write_text("schema = 1\n" + rule)
    out = tmp_path / "out"
    given = (
        "--policies",
        f"exact,{tmp_path / 'mine.toml'}",
        "--lengths",
        "128,1K",
        "--tasks",
        "errors",
        "--text",
        text,
    )
    result = run(*given, "--out", out, "--device", "cpu", "--model", "anything")
    assert tiny == [("anything", "cpu", "float32")]
    assert "Attention, mean over the layers" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("1,024")]
    assert [line[1] for line in lines] == ["exact", "mine", "mine"]
    assert "note: random weights" in result.stderr
    assert "takes about" in result.stderr
    assert {path.name for path in out.iterdir()} >= {"setting.json", "results.json", "pieces"}
    again = run(*given, "--out", out, "--device", "cpu", "--model", "anything", "--json")
    body = json.loads(again.stdout)
    assert body["about"]["model"]["name"] == "anything"
    assert {site["length"] for site in body["sites"]} == {128, 1024}
    assert "pieces were read" in again.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tasks", "perplexty"), "did you mean 'perplexity'"),
        (("--policies", "powr"), "did you mean 'power'"),
        (("--lengths", "2M"), "whole numbers of tokens, as 4096 or 4K, got '2M'"),
        (("--depths", "half"), "numbers from 0 to 1, got 'half'"),
        (("--rope-scaling", "16x"), "a factor above 1"),
        (("--device", "gpu9"), "there is no device 'gpu9'"),
        (("--text", "nowhere.txt"), "there is no text file nowhere.txt"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(tiny, args, message):
    result = run(*args, code=2)
    assert message in result.stderr
    assert tiny == []


def test_a_length_beyond_the_context(tiny, tmp_path):
    result = run("--lengths", "2K", "--out", tmp_path / "out", code=2)
    assert "--rope-scaling yarn:2" in result.stderr
    assert not (tmp_path / "out").exists()


def test_stopped(tiny, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("effattn.evaluate.evaluate", stop)
    result = run("--out", tmp_path / "out", code=130)
    assert f"goes on from what is in {tmp_path / 'out'}" in result.stderr


def test_a_directory_without_a_tokenizer(tmp_path):
    llama(layers=1).save_pretrained(tmp_path / "model")
    model, tokenizer, notes = models.language_model(str(tmp_path / "model"), device="cpu", dtype="bfloat16")
    assert (tokenizer, str(model.dtype)) == (None, "torch.bfloat16")
    assert "no tokenizer" in notes[0]
