"""What is asked wrongly is told before anything runs; prompts and texts are what they say."""

from __future__ import annotations

import types

import pytest
import torch
from evaluating import CONTEXT, Characters, ids, llama, policy

from effattn.compiler.capture import Tapped
from effattn.errors import EvaluationError, PolicyError
from effattn.evaluate import evaluate
from effattn.evaluate.estimate import Estimate
from effattn.evaluate.records import Looked
from effattn.evaluate.rope import RopeScaling, scaled
from effattn.evaluate.setting import Setting
from effattn.evaluate.show.progress import duration
from effattn.evaluate.tasks.passkey import ANSWER_TOKENS, answer, passkey, retrieved
from effattn.evaluate.text import long_text
from effattn.versions import cache_argument


@pytest.fixture(scope="module")
def model():
    return llama()


def never(*args, **kwargs):
    raise AssertionError("a model was run")


WRONG = {
    "task": ({"tasks": ("perplexty",)}, r"unknown task 'perplexty'; did you mean 'perplexity'\?"),
    "no task": ({"tasks": ()}, "no task given"),
    "twice": ({"lengths": (64, 64)}, "length 64 is named twice"),
    "length": ({"lengths": (1,)}, "at least 16, got 1"),
    "not whole": ({"lengths": (64.5,)}, r"whole number .*, got 64\.5"),
    "context": ({"lengths": (CONTEXT * 3,)}, r"3,072 tokens are more than the 1,024 .*--rope-scaling yarn:3"),
    "rope": ({"rope_scaling": "yran:4"}, r"unknown kind 'yran' of RoPE scaling; did you mean 'yarn'\?"),
    "factor": ({"rope_scaling": "yarn:1"}, "a factor above 1"),
    "not enough": ({"lengths": (CONTEXT * 2,), "rope_scaling": "yarn:1.5"}, r"2,048 tokens are more than the 1,536"),
    "depth": ({"depths": (1.5,)}, r"depth must be from 0 .*, got 1\.5"),
    "no depth": ({"depths": ()}, "no depth given"),
    "trials": ({"trials": 0}, "trials must be a whole number of at least 1, got 0"),
    "rest": ({"rest": "inducter"}, "did you mean 'inductor'"),
    "no policy": ({"policies": ()}, "no policies"),
    "same name": ({"policies": ("exact", {"schema": 1, "name": "exact"})}, "two policies are called 'exact'"),
    "dense": ({"policies": ({"schema": 1, "name": "dense"},)}, "uncompiled model is called 'dense'"),
    "short text": ({"lengths": (512,), "segments": 2}, "has 600 tokens, .* ask for 1,024"),
    "passkey": ({"lengths": (128,), "tasks": ("passkey",)}, "more than the length 128"),
    "tokenizer": ({"tokenizer": None}, "passkey needs a tokenizer"),
    "no text": ({"tokenizer": None, "tasks": ("time",), "text": None}, "pass text as token ids"),
    "ids": ({"text": torch.full((1, 600), 99)}, "from 0 to 98"),
    "ids' shape": ({"text": ids()[0]}, r"\[1, N\]"),
    "file": ({"text": "nowhere.txt"}, r"cannot read the text nowhere\.txt"),
    "class": (
        {"policies": ({"schema": 1, "name": "p", "rule": [{"model": "LlamaForCausalLM", "forms": ["power"]}]},)},
        "name LlamaModel",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(model, case, monkeypatch, tmp_path):
    monkeypatch.setattr(Tapped, "run", never)
    changes, message = WRONG[case]
    given = {"tokenizer": Characters(), "policies": ("exact",), "lengths": (400,), "text": ids(600), **changes}
    with pytest.raises(EvaluationError, match=message):
        evaluate(model, **given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_policies(model):
    with pytest.raises(PolicyError, match="did you mean 'power'"):
        evaluate(model, None, ("powr",), text=ids())
    beyond = {"schema": 1, "name": "p", "rule": [{"layers": "0-7", "forms": ["power"]}]}
    with pytest.raises(PolicyError, match="the model has 2 layers"):
        evaluate(model, None, (beyond,), lengths=(64,), tasks=("errors",), text=ids())


def test_models_that_cannot_be_evaluated(model):
    with pytest.raises(EvaluationError, match="no causal language model"):
        evaluate(torch.nn.Linear(2, 2))
    with pytest.raises(EvaluationError, match="ends with ForCausalLM"):
        evaluate(model.model)


class NoAttention(torch.nn.Module):
    """Names of a transformers model around an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(99, 8), torch.nn.Linear(8, 99)
        self.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace())

    @property
    def base_model(self):
        return self.embedding

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head


def test_a_model_without_attention():
    model = NoAttention()
    model.embedding.forward = lambda ids, use_cache: torch.nn.functional.embedding(ids, model.embedding.weight)
    with pytest.raises(EvaluationError, match=r"no attention was found in NoAttention.*effattn explain"):
        evaluate(model, None, ("exact",), lengths=(64,), tasks=("errors",), text=ids())


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [400, 777, 3000])
def test_a_passkey_is_where_it_should_be(length, depth):
    prompt = passkey(Characters(), length, depth, 0)
    assert length - 90 - ANSWER_TOKENS < prompt.ids.shape[1] <= length - ANSWER_TOKENS
    text = Characters().decode(prompt.ids[0].tolist())
    assert text.count(prompt.key) == 2
    before, after = text.split(f"The pass key is {prompt.key}")
    repeats = before.count("The grass"), after.count("The grass")
    assert repeats[0] == round(depth * sum(repeats))
    assert text.endswith("The pass key is")
    assert torch.equal(passkey(Characters(), length, depth, 0).ids, prompt.ids)
    assert passkey(Characters(), length, depth, 1).key != prompt.key


def test_the_answer_is_greedy(model):
    prompt = ids(40)
    found = answer(model.model, model.lm_head, Characters(), prompt, cache_argument(model.model.forward))
    with torch.no_grad():
        made = prompt
        for _ in range(ANSWER_TOKENS):
            made = torch.cat([made, model(made, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    expected = made[0, 40:].tolist()
    if 2 in expected:
        expected = expected[: expected.index(2)]
    assert found == Characters().decode(expected)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('12345".', True),
        (" 12345. Remember", True),
        ("is 12345", True),
        ("123456", False),
        ("1 2345", False),
        ("", False),
        ("no", False),
    ],
)
def test_what_counts_as_retrieved(text, right):
    assert retrieved("12345", text) is right


def test_texts_begin_as_the_model_expects(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10)
    text = long_text(path, Characters(), 40, 99)
    first, second = text.segment(20), text.segment(20, 1)
    assert first.shape == second.shape == (1, 20)
    assert first[0, 0] == second[0, 0] == 1
    assert torch.cat([first[0, 1:], second[0, 1:]]).tolist() == Characters()("abcdefghij" * 4, False)["input_ids"][:38]
    path.write_bytes(b"abc\xff")
    with pytest.raises(EvaluationError, match=r"not UTF-8 text \(byte 3\)"):
        long_text(path, Characters(), 2, 99)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "linear"])
def test_scaled_positions_are_undone(model, kind):
    inside, before = ids(64), model.model.rotary_emb
    with torch.no_grad():
        plain = model(inside, use_cache=False).logits
        with scaled(model, RopeScaling(kind, 4.0)):
            assert model.model.rotary_emb is not before
            other = model(ids(2 * CONTEXT), use_cache=False, logits_to_keep=1).logits
        assert other.isfinite().all()
        assert model.model.rotary_emb is before
        assert torch.equal(model(inside, use_cache=False).logits, plain)
    assert str(RopeScaling.read(f"{kind}:4")) == f"{kind}:4"


def test_the_estimate_adds_up():
    looked = Looked(
        sites=3, short=100, short_seconds=1.0, long=200, long_seconds=3.0, site_seconds=2.0, compilation=5.0,
        densities=[], notes=[],
    )  # fmt: skip
    setting = Setting.read([policy("exact")], lengths=(400,), tasks=("errors", "perplexity"))
    estimate = Estimate(looked, setting)
    assert estimate.forward(100) == pytest.approx(1.0)
    assert estimate.forward(200) == pytest.approx(3.0)
    assert estimate.forward(400) == pytest.approx(0.005 * 400 + 5e-5 * 400**2)
    assert estimate.total() == pytest.approx(3 * estimate.forward(400) + 3 * 8.0 + 15.0)
    assert [duration(seconds) for seconds in (0.1, 90, 720, 12_600)] == ["1 s", "90 s", "12 min", "3.5 h"]


def test_a_model_that_scales_its_logits(model, monkeypatch):
    forward = type(model).forward

    def scaling(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(type(model), "forward", scaling)
    with pytest.raises(EvaluationError, match="changes its logits after its head"):
        evaluate(model, None, ("exact",), lengths=(64,), tasks=("perplexity",), text=ids())
