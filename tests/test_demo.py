"""The demonstration compiles a model once, whatever length comes next; what it measures it tells as it is."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import sys
import xml.etree.ElementTree

import pytest
import torch
from comparing import assert_close
from torch._dynamo.backends.registry import lookup_backend
from transformers import LlamaConfig, LlamaForCausalLM

PATH = pathlib.Path(__file__).parents[1] / "examples" / "demo.py"


class _Tokenizer:
    """Nine tokens of a question, and names of ids for text."""

    eos_token_id = -1

    def apply_chat_template(self, chat, **_):
        return {"input_ids": torch.arange(9)[None]}

    def decode(self, ids, **_):
        return " ".join(map(str, ids.tolist()))


class _Counter:
    """A backend that makes autograd's graph, as Inductor does, and counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, gm, example_inputs):
        self.calls += 1
        return lookup_backend("aot_eager")(gm, example_inputs)


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, str(PATH.parent))
    yield
    sys.path.remove(str(PATH.parent))


@pytest.fixture(scope="module")
def demo(examples):
    spec = importlib.util.spec_from_file_location("effattn_demo", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def test_one_graph_for_report_answer_and_long_text(demo, model):
    import policies

    torch._dynamo.reset()
    text, counter = torch.arange(48)[None], _Counter()
    fast = torch.compile(model, backend=counter)
    with torch.no_grad():
        fast(input_ids=policies.of_any_length(text[:, :24]), use_cache=False)
        answer, _ = demo.generate(fast, _Tokenizer(), "cpu", 3)
        logits = fast(input_ids=text, use_cache=False).logits
        assert_close(logits, model(input_ids=text, use_cache=False).logits)
    assert len(answer.split()) == 3
    assert counter.calls == 1


class _Silent:
    """A screen that nobody looks at."""

    @contextlib.contextmanager
    def step(self, text):
        yield


def test_padded_prompts_by_each_backend(model, monkeypatch, tmp_path):
    import comparison

    monkeypatch.setitem(comparison.PADDED, "cpu", (1, 48))
    text = torch.arange(96).remainder(64)[None]
    cases = list(comparison.padded(model, text, ["eager", "effattn"], "eager", _Silent()))
    assert len(model.base_model.layers) == 2  # the model is as it was
    for rows in cases:
        assert [row.backend for row in rows] == ["eager", "effattn"]
        assert all(row.seconds > 0 and row.mib > 0 and row.difference < 1e-4 for row in rows)
        assert comparison.as_table(rows).row_count == 2
    path = comparison.write_picture([row for rows in cases for row in rows], "A & B", tmp_path / "picture.svg")
    bars = [element for element in xml.etree.ElementTree.parse(path).iter() if element.tag.endswith("rect")]
    assert len(bars) == 1 + 2 * len(cases) * 2  # the ground, and time and memory of each


def test_what_is_no_gain_says_so():
    import comparison

    rows = [comparison.Measured("a", "eager", 2.0, 100.0, 0.0), comparison.Measured("a", "effattn", 4.0, 25.0, 0.0)]
    assert comparison.verdict(rows) == "against eager: 0.25 of its memory and 2 of its time (no gain here)"
