"""Every Python and TOML example of the README works as written."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from comparing import assert_close

import effattn

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    found = [body for name, body in BLOCK.findall(README.read_text(encoding="utf-8")) if name == language]
    return [pytest.param(body, id=str(number)) for number, body in enumerate(found)]


class _Attention(torch.nn.Module):
    """What the examples call ``model``: one causal attention."""

    def forward(self, input_ids, use_cache=True):
        q = k = v = torch.nn.functional.one_hot(input_ids, 16).float()[:, None]
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _Words:
    """A tokenizer without files: a number for every word."""

    def __call__(self, text, return_tensors):
        ids = torch.tensor([[len(word) for word in text.split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids):
        return " ".join(map(str, ids.tolist()))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Whatever is loaded by name is a small model with random weights; nothing is compiled by Inductor."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "long.txt").write_text("a text that would be long " * 4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=2, pad_token_id=0, eos_token_id=None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: _Words())
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name: transformers.LlamaForCausalLM(config)
    )
    monkeypatch.setattr("effattn.compiler.backend.compile_rest", lambda gm, inputs, settings: gm.forward)


@pytest.mark.parametrize("source", blocks("python"))
def test_python(source, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    names = {"model": _Attention(), "input_ids": torch.arange(16)[None], "torch": torch}
    exec(compile(source, str(README), "exec"), names)
    if "fast" in names:
        names["fast"] = torch.compile(names["model"], backend="effattn", options={"rest": "eager"})
        assert_close(names["fast"](names["input_ids"]), names["model"](names["input_ids"]))
    if "report" in names:
        assert [site.predicate for site in names["report"].sites] == ["k <= q"]
        assert "1 of 1 attention sites found" in capsys.readouterr().out
    if "tokens" in names:
        printed = capsys.readouterr().out
        assert "2 of 2 attention sites found, 2 replaced, policy 'proxy'" in printed
        assert "form  " in printed
        assert len(printed.splitlines()[-1].split()) == 40
    if "out" in names:
        assert names["out"].isfinite().all()


@pytest.mark.parametrize("source", blocks("toml"))
def test_toml(source, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(source, encoding="utf-8")
    assert effattn.Policy.load(path).rules


def test_the_report_shown_is_the_report_printed(capsys):
    """A model of SmolLM2's attention with random weights: the report does not look at weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(vocab_size=97, intermediate_size=16, **sizes)
    (source,) = (block.values[0] for block in blocks("python") if "report = effattn.explain(" in block.values[0])
    (shown,) = re.findall(r"^```\n(effattn: .*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    torch._dynamo.reset()
    names = {"model": transformers.LlamaForCausalLM(config), "input_ids": torch.randint(0, 97, (1, 64))}
    exec(compile(source, str(README), "exec"), names)
    left_out = ("    at  ", "  passes took")  # the README says so
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(left_out)]
    assert [line for line in printed if line] == [line for line in shown.splitlines() if line]


def test_there_are_examples():
    assert len(blocks("python")) >= 3
    assert blocks("toml")
