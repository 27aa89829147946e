"""The demonstration compiles a model once, whatever length comes next: to compile is most of its time."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest
import torch
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


@pytest.fixture(scope="module")
def demo():
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
    torch._dynamo.reset()
    text, counter = torch.arange(48)[None], _Counter()
    fast = torch.compile(model, backend=counter)
    with torch.no_grad():
        fast(input_ids=demo.of_any_length(text[:, :24]), use_cache=False)
        answer, _ = demo.generate(fast, _Tokenizer(), "cpu", 3)
        logits = fast(input_ids=text, use_cache=False).logits
        torch.testing.assert_close(logits, model(input_ids=text, use_cache=False).logits)
    assert len(answer.split()) == 3
    assert counter.calls == 1
