"""``model`` in a rule: the class that is compiled and every class around an attention, however it is compiled."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from comparing import assert_close
from torch.nn.functional import scaled_dot_product_attention

import effattn
from effattn.compiler.options import Options
from effattn.compiler.report import collect


def window(model):
    """A policy that asks for a window wherever ``model`` matches."""
    params = {"window": {"window": 4, "sinks": 0}}
    return {"rule": [{"model": model, "forms": ["window"], "params": params}]}


@pytest.fixture
def forms():
    """``forms(model, run)``: what a rule for class ``model`` asked for, a site each, while ``run(compile)`` ran."""

    def listen(model, run):
        torch._dynamo.reset()
        options = {"rest": "eager", "policy": window(model)}
        with collect.listening() as heard, torch.no_grad():
            run(functools.partial(torch.compile, backend="effattn", options=options))
        sites = heard.report(Options.read(options)).sites
        assert sites
        return ["window" if "window" in {one["form"] for one in site.candidates} else "exact" for site in sites]

    return listen


# --- plain modules ---------------------------------------------------------------------------------------------------


def causal(x):
    return scaled_dot_product_attention(x, x, x, is_causal=True)


def with_any_arguments(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def unnamed(function):
    def inner(*args):
        return function(*args)

    return inner


class Plain(torch.nn.Module):
    def forward(self, x):
        return causal(x)


class OtherWord(torch.nn.Module):
    def forward(this, x):
        return causal(x)


class Decorated(torch.nn.Module):
    @with_any_arguments
    def forward(self, x):
        return causal(x)


class DecoratedTwice(torch.nn.Module):
    @unnamed
    @with_any_arguments
    def forward(self, x):
        return causal(x)


class Inherits(Decorated):
    pass


class Broken(torch.nn.Module):
    scale = 2.0

    def forward(self, x):
        y = x + 1
        torch._dynamo.graph_break()
        return causal(y * self.scale)  # without self here, nothing in what is compiled last would tell its class


class Nested(torch.nn.Module):
    def __init__(self, kind=Plain):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"attn": kind()}) for _ in range(2)])

    @with_any_arguments
    def forward(self, x):
        for layer in self.layers:
            x = layer["attn"](x)
        return x


X = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
PLAIN = [Plain, OtherWord, Decorated, DecoratedTwice, Inherits, Broken, Nested]


def in_place(compile_, model):
    model.compile(backend=compile_.keywords["backend"], options=compile_.keywords["options"])
    return model


def forward_of(compile_, model):
    model.forward = compile_(model.forward)
    return model


WAYS = {
    "whole": lambda compile_, model: compile_(model),
    "forward": lambda compile_, model: compile_(model.forward),
    "its forward": forward_of,
    "model.compile": in_place,
    "function": lambda compile_, model: compile_(lambda x: model(x)),
    "argument": lambda compile_, model: functools.partial(compile_(lambda model, x: model(x)), model),
    "a list": lambda compile_, model: functools.partial(compile_(lambda models, x: models[0](x)), [model]),
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", PLAIN)
def test_the_class_that_is_compiled(forms, kind, how):
    def run(compile_):
        WAYS[how](compile_, kind())(X)

    assert set(forms(kind.__name__, run)) == {"window"}


def test_another_class(forms):
    assert forms("Plane", lambda compile_: compile_(Plain())(X)) == ["exact"]


@pytest.mark.parametrize("model", ["Nested", "ModuleDict", "OtherWord", "Other*"])
def test_every_class_around(forms, model):
    assert forms(model, lambda compile_: compile_(Nested(OtherWord))(X)) == ["window", "window"]


def test_layer_by_layer(forms):
    def run(compile_):
        model = Nested()
        for layer in model.layers:
            layer["attn"] = compile_(layer["attn"])
        model(X)

    assert set(forms("Plain", run)) == {"window"}
    assert set(forms("Nested", run)) == {"exact"}  # no guard of Dynamo would notice that another model calls the layer


def test_what_a_function_is_given_is_not_around_its_own_attention(forms):
    def score(model, x):
        return causal(x)

    def run(compile_):
        compile_(score)(Plain(), X)

    assert forms("Plain", run) == ["exact"]


def test_a_method_that_two_classes_share_is_compiled_for_each():
    """Neither looks at its module, so that only our guard tells them apart."""

    class First(OtherWord):
        pass

    class Second(OtherWord):
        pass

    torch._dynamo.reset()
    options = {"rest": "eager", "policy": window("First")}
    first, second = (torch.compile(kind(), backend="effattn", options=options) for kind in (First, Second))
    assert not torch.allclose(first(X), causal(X), atol=1e-3)
    assert_close(second(X), causal(X))


def test_a_forward_that_the_instance_has(forms):
    def run(compile_):
        model = Plain()
        model.forward = functools.partial(lambda module, x: causal(x), model)
        compile_(model)(X)

    assert forms("Plain", run) == ["window"]


# --- transformers ----------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
FAMILIES = {
    "Llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "Mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": None},
    "Qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "GPT2": {},
}
HEADS = {"GPT2": "LMHeadModel"}
IDS = torch.arange(16)[None]


def made(family):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    return getattr(transformers, family + HEADS.get(family, "ForCausalLM"))(config).eval()


def generate(compile_, model):
    model.forward = compile_(model.forward)
    return lambda ids: model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(
    ("model", "how"),
    [
        *[("LlamaForCausalLM", how) for how in ("whole", "forward", "model.compile", "function", "generate")],
        *[(name, "whole") for name in ("LlamaModel", "Llama*Attention", "MistralForCausalLM", "Qwen2ForCausalLM")],
        *[(name, "whole") for name in ("GPT2LMHeadModel", "GPT2Model", "GPT2Attention")],
    ],
)
def test_transformers(forms, model, how):
    (family,) = (name for name in FAMILIES if model.startswith(name))

    def run(compile_):
        (WAYS | {"generate": generate})[how](compile_, made(family))(IDS)

    assert set(forms(model, run)) == {"window"}


def test_layers_of_transformers(forms):
    def run(compile_):
        model = made("Llama")
        for layer in model.model.layers:
            layer.compile(backend="effattn", options=compile_.keywords["options"])
        model(IDS)

    assert set(forms("LlamaDecoderLayer", run)) == {"window"}
    assert set(forms("LlamaAttention", run)) == {"window"}


def test_the_report_of_explain():
    with torch.no_grad():
        report = effattn.explain(made("Llama"), IDS, policy=window("LlamaForCausalLM"), use_cache=False)
    assert [site.form for site in report.sites] == ["window", "window"]


# --- layers and paths ------------------------------------------------------------------------------------------------


def t5(blocks=3, decoder=2):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 32, "vocab_size": 97}
    return transformers.T5Model(transformers.T5Config(num_layers=blocks, num_decoder_layers=decoder, **sizes)).eval()


def explained(model, rule):
    with torch.no_grad():
        return effattn.explain(model, IDS, decoder_input_ids=IDS, use_cache=False, policy={"rule": [rule]})


def test_layers_are_numbered_where_modules_of_one_class_stand():
    """T5 has lists in its layers: attention, cross attention, MLP."""
    report = explained(t5(), {"site": "decoder.*SelfAttention", "layers": "1", "forms": ["window"]})
    assert [(site.path.partition(".")[0], site.layer) for site in report.sites] == [
        *[("encoder", layer) for layer in (0, 1, 2)],
        *[("decoder", layer) for layer in (0, 0, 1, 1)],
    ]
    assert [site.path for site in report.sites if site.form == "window"] == ["decoder.block.1.layer.0.SelfAttention"]


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"layers": "0-2"}, None),
        ({"layers": "3-"}, "key rule[0].layers: 3- starts after the last layer: the model has 3 layers, 0 to 2"),
        ({"layers": "0-2", "site": "decoder.*"}, "0-2 ends after the last layer: the model has 2 layers, 0 to 1"),
        ({"layers": "90", "model": "Llama*"}, None),
    ],
    ids=str,
)
def test_layers_that_the_model_does_not_have(rule, problem):
    if problem is None:
        explained(t5(), {**rule, "forms": ["window"]})
        return
    with pytest.raises(effattn.PolicyError, match=re.escape(problem)):
        explained(t5(), {**rule, "forms": ["window"]})
