"""A policy that does not do what it says is told once, with the reason and what to do; one that does is silent."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import effattn


class Attention(torch.nn.Module):
    def forward(self, x, mask=None):
        if mask is None:
            return scaled_dot_product_attention(x, x, x, is_causal=True)
        length = x.shape[-2]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None]
        return (x @ x.mT).masked_fill(~allowed, -torch.inf).softmax(-1) @ x


class Model(torch.nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention() for _ in range(count)])

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask)
        return x


X = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
ONES = torch.ones(1, 16, dtype=torch.bool)
PARAMS = {"window": {"window": 4, "sinks": 0}}
RULE = {"forms": ["window"], "params": PARAMS}
PADDED = (
    "the mask depends on data (padding or documents), and without sinks in reach a padded query may be left without "
    "any key, which gives NaN here"
)
HINT = "set sinks to 1 or more, or leave attention_mask out where nothing is padded"


def told(policy, *calls, model=None):
    """What is warned of a policy while a compiled model is called with each of ``calls``."""
    torch._dynamo.reset()
    fast = torch.compile(model or Model(), backend="effattn", options={"rest": "eager", "policy": policy})
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for call in calls:
            fast(*call)
    return [str(one.message) for one in caught if "policy" in str(one.message)]


def rules(*rules):
    return {"name": "mine", "rule": list(rules)}


def test_a_form_that_is_refused_everywhere():
    text = f"effattn, policy 'mine': window applies to 0 of 3 sites: at 3 {PADDED} ({HINT})"
    assert told(rules(RULE), (X, ONES)) == [text]


def test_it_is_told_once_for_each_compiled_model():
    longer = (torch.randn(1, 2, 24, 8), torch.ones(1, 24, dtype=torch.bool))
    assert len(told(rules(RULE), (X, ONES), longer, (X[..., :4], ONES))) == 1
    assert len(told(rules(RULE), (X, ONES))) == 1


@pytest.mark.parametrize(
    "rule",
    [
        (RULE,),
        ({**RULE, "layers": "1-"},),  # a part, as planned
        ({**RULE, "min_length": 4096},),  # decided when it runs
        ({**RULE, "forms": ["power", "window"]},),
        ({"layers": "0-1", "forms": ["exact"]}, RULE),
        ({"model": "Other", "forms": ["window"]}, {**RULE, "model": "Model"}),  # a file for several models
        ({"forms": ["auto", "window"]},),
        ({"forms": ["exact"]},),
        (),
    ],
    ids=str,
)
def test_what_is_as_planned_is_silent(rule):
    assert told(rules(*rule), (X,)) == []


def test_without_a_policy_nothing_is_told():
    assert told(None, (X, ONES)) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            {**RULE, "model": "LlamaForCausalLM"},
            "model LlamaForCausalLM matches nothing: the modules around attention here are Model, ModuleList, "
            "Attention; name one of these, or compile the whole model",
        ),
        (
            {**RULE, "site": "decoder.*"},
            "site decoder.* matches nothing: attention here is in layers.0, layers.1, layers.2",
        ),
        ({**RULE, "layers": "0-5"}, "policy dict, key rule[0].layers: 0-5 ends after the last layer: the model has 3"),
        ({**RULE, "layers": "3-"}, "policy dict, key rule[0].layers: 3- starts after the last layer: the model has 3"),
        ({**RULE, "stage": "decode"}, "window at 0 of 3 sites: stage prefill, and the policy is for decode"),
    ],
    ids=str,
)
def test_a_rule_that_matches_nothing(rule, text):
    (warning,) = told(rules(rule), (X,))
    assert warning.startswith(f"effattn, policy 'mine': {text}")
    assert warning.count("rule[0]") == text.count("rule[0]")


def test_training():
    """The shipped policies are for inference; who forgets no_grad would otherwise compare exact with exact."""
    torch._dynamo.reset()
    fast = torch.compile(Model(), backend="effattn", options={"rest": "eager", "policy": "window"})
    with pytest.warns(UserWarning, match=r"window at 0 of 3 sites: stage train.*run under torch.no_grad\(\)"):
        fast(X.clone().requires_grad_())


def test_layers_on_their_own():
    model = Model()
    (warning,) = told(rules({**RULE, "layers": "1-"}), (X,), model=model.layers[1])
    assert "layers 1- match nothing: which layer an attention is in is not known here; compile the whole" in warning
    (warning,) = told(rules({**RULE, "site": "layers.*"}), (X,), model=model.layers[1])
    assert "site layers.* matches nothing: which module an attention is in is not known here; compile the" in warning


def test_each_of_several_rules_has_its_name():
    (warning,) = told(rules({**RULE, "layers": "0"}, {**RULE, "site": "head.*"}), (X, ONES))
    assert "rule[0]: window applies to 0 of 1 site: at 1 the mask depends on data" in warning
    assert "rule[1]: site head.* matches nothing" in warning


def test_a_model_with_graph_breaks_is_judged_as_a_whole():
    class Broken(Model):
        def forward(self, x, mask=None):
            x = self.layers[0](x, mask)
            torch._dynamo.graph_break()
            return self.layers[2](self.layers[1](x, mask), mask)

    assert told(rules({**RULE, "site": "layers.2"}), (X,), model=Broken()) == []
    (warning,) = told(rules({**RULE, "site": "layer.2"}), (X,), model=Broken())
    assert "site layer.2 matches nothing" in warning


def test_the_report_says_the_same():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        report = effattn.explain(Model(), X, ONES, policy=rules(RULE))
    (text,) = report.shortcomings
    assert text == f"window applies to 0 of 3 sites: at 3 {PADDED} ({HINT})"
    assert f"  policy     {text}\n" in str(report)
    assert report.to_dict()["policy"]["shortcomings"] == [text]


@pytest.mark.parametrize(
    ("min_length", "said"), [(0, ", not exact: "), (16, ", not exact: "), (17, ", exact at this length: ")]
)
def test_below_min_length_the_report_says_exact(tmp_path, min_length, said):
    with torch.no_grad():
        report = effattn.explain(Model(), X, policy=rules({**RULE, "min_length": min_length}))
    assert said in str(report)
    assert {site.here for site in report.sites} == {"exact" if min_length > 16 else "window"}
    page = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("exact at this length" in page) == (min_length > 16)
    assert report.shortcomings == ()
