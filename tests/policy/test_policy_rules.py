"""Which rule a site gets, layer ranges, and finding the line of a key."""

from __future__ import annotations

import re
import tomllib

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from effattn.errors import PolicyError
from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.site import Layout, Site
from effattn.policy import Policy, layers
from effattn.policy.locate import line_of, lines_of

SIZES = Layout(1, 4, 2, 64, 64, 16, 16)


def site(
    layer=None, stage="prefill", classes=("LlamaForCausalLM", "LlamaModel", "LlamaAttention"), path="", count=None
):
    return Site(
        name="attention_0",
        found_as="sdpa",
        stage=stage,
        layout=SIZES,
        hints=SIZES,
        spec=AttentionSpec(expr.s / 4, expr.k <= expr.q, empty_rows="never"),
        position=expr.q,
        dtype="float32",
        device="cpu",
        needs_grad=False,
        output_layout="bhnd",
        layer=layer,
        layer_count=count,
        path=path,
        module_classes=classes,
    )


def test_the_helper_makes_a_real_site():
    assert site().spec.predicate == sympy.Le(expr.k, expr.q)


POLICY = Policy.of(
    {
        "rule": [
            {"layers": "0-1", "forms": ["exact"]},
            {"stage": ["decode"], "forms": ["window"]},
            {"model": "Llama*", "layers": "2-", "forms": ["power"]},
            {"model": ["Bert", "Gemma?ForCausalLM"], "forms": ["window"]},
        ]
    }
)


@pytest.mark.parametrize(
    ("given_site", "index"),
    [
        (site(layer=0), 0),
        (site(layer=1, stage="decode"), 0),  # the first match wins
        (site(layer=2), 2),
        (site(layer=2, stage="decode"), 1),
        (site(layer=99), 2),
        (site(layer=5, classes=("MistralModel",)), None),
        (site(layer=5, classes=("Outer", "Gemma3ForCausalLM")), 3),
        (site(layer=5, classes=("gemma3forcausallm",)), None),  # case matters
        (site(layer=5, classes=()), None),
    ],
)
def test_first_matching_rule(given_site, index):
    match = POLICY.match(given_site)
    assert match.index == index
    assert match.rule is (None if index is None else POLICY.rules[index])
    assert POLICY.rule_for(given_site) is match.rule
    assert match.notes == ()


def test_an_unknown_layer_matches_no_rule_that_names_layers_and_says_so():
    match = POLICY.match(site(layer=None))
    assert match.rule is None
    assert len(match.notes) == 2
    assert "rule[0]" in match.notes[0]
    assert "names layers 0-1" in match.notes[0]
    assert POLICY.match(site(layer=None, classes=("Bert",))).index == 3


@pytest.mark.parametrize(
    ("spelling", "count", "problem"),
    [
        ("0-3", 4, None),
        ("0-3", 3, "0-3 ends after the last layer: the model has 3 layers, 0 to 2"),
        ("0, 5", 4, "5 is after the last layer: the model has 4 layers, 0 to 3"),
        ("5-8", 4, "5-8 starts after the last layer: the model has 4 layers, 0 to 3"),
        ("2-", 3, None),
        ("0-1, 3-", 3, "3- starts after the last layer: the model has 3 layers, 0 to 2"),
        ("0-3 of every 7", 3, None),
        ([0, 9], 9, "9 is after the last layer: the model has 9 layers, 0 to 8"),
        ("0", 0, "the model has no layers"),
    ],
)
def test_check_layers(tmp_path, spelling, count, problem):
    path = tmp_path / "p.toml"
    path.write_text(f"[[rule]]\nforms = ['power']\n# here\nlayers = {spelling!r}\n")
    policy = Policy.load(path)
    if problem is None:
        policy.check_layers(count)
        return
    with pytest.raises(PolicyError) as caught:
        policy.check_layers(count)
    assert str(caught.value) == f"{path}, line 4, key rule[0].layers: {problem}"


def test_check_layers_leaves_rules_for_other_models_alone():
    policy = Policy.of({"rule": [{"model": "Big*", "layers": "90", "forms": ["power"]}]})
    policy.check_layers(4, classes=["SmallModel"])
    with pytest.raises(PolicyError, match="90 is after the last layer"):
        policy.check_layers(4, classes=["Outer", "BigModel"])
    with pytest.raises(PolicyError, match="policy dict"):
        policy.check_layers(4)


ENCODER_DECODER = [
    site(layer=layer, path=f"{part}.layers.{layer}.attn", count=count)
    for part, count in (("encoder", 4), ("decoder", 2))
    for layer in range(count)
]


@pytest.mark.parametrize(
    ("rule", "sites"),
    [
        ({"site": "decoder.*"}, [4, 5]),
        ({"site": "decoder.*", "layers": "0"}, [4]),
        ({"site": ["*.layers.1.*", "encoder.layers.?.attn"]}, [0, 1, 2, 3, 5]),
        ({"site": "decoder"}, []),  # the whole path, not a part of it
        ({"site": "Decoder.*"}, []),
        ({"site": "*"}, [0, 1, 2, 3, 4, 5]),
        ({"layers": "3"}, [3]),
    ],
    ids=str,
)
def test_a_rule_for_places(rule, sites):
    policy = Policy.of({"rule": [{**rule, "forms": ["power"]}]})
    assert [number for number, one in enumerate(ENCODER_DECODER) if policy.match(one).rule is not None] == sites
    assert Policy.of(tomllib.loads(policy.to_toml())) == policy


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"layers": "0-3"}, None),  # the encoder has them
        ({"site": "decoder.*", "layers": "0-1"}, None),
        ({"site": "decoder.*", "layers": "0-3"}, "0-3 ends after the last layer: the model has 2 layers, 0 to 1"),
        ({"site": "encoder.*", "layers": "4-"}, "4- starts after the last layer: the model has 4 layers, 0 to 3"),
        ({"model": "Other", "layers": "90"}, None),
        ({"site": "nowhere", "layers": "90"}, None),
    ],
    ids=str,
)
def test_layers_are_counted_where_the_rule_holds(rule, problem):
    policy = Policy.of({"rule": [{**rule, "forms": ["power"]}]})
    if problem is None:
        policy.check_sites(ENCODER_DECODER)
        return
    with pytest.raises(PolicyError, match=re.escape(problem)):
        policy.check_sites(ENCODER_DECODER)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("0", "0"),
        ("0-3, 8, 20-", "0-3, 8, 20-"),
        ("0-1,5  of every  7", "0-1, 5 of every 7"),
        (" 8 ,0 - 3,2-5 ", "0-5, 8"),
        ("3-, 5", "3-"),
        ("1,2,3", "1-3"),
        ([3, 1, 2, 9], "1-3, 9"),
        (7, "7"),
    ],
)
def test_layer_spellings(spelling, canonical):
    assert str(layers.read(spelling)) == canonical


@pytest.mark.parametrize(
    "wrong", ["", "a", "1-2-3", "-1", "1,,2", "3-1", "٣", "1 2", None, [], [1.0], ["1"], True, -1, {}]
)
def test_wrong_layers(wrong):
    with pytest.raises(ValueError, match=r"."):
        layers.read(wrong)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10) | st.none()), min_size=1, max_size=5))
def test_ranges_hold_what_they_name(ranges):
    text = ", ".join(f"{first}-" if width is None else f"{first}-{first + width}" for first, width in ranges)
    read = layers.parse(text)
    for layer in range(60):
        named = any(first <= layer and (width is None or layer <= first + width) for first, width in ranges)
        assert (layer in read) == named
    assert layers.parse(str(read)) == read


# --- lines -----------------------------------------------------------------------------------------------------------

TEXT = '''\
# [[rule]] in a comment
name = "a # b = [c]"
description = """
[[rule]]
fake = 1
"""
[provenance]
"odd key".'x.y' = 'don = "t'
list = [
  1, # ]
  2,
]
[[rule]]
forms = ["power"]
params.power = { block = 64 }
[[ rule ]]
forms = [
  "power",
]
  [rule.params."power"]
  block = 1.5
[rule.deep]
[[rule.deep.more]]
x = 1
[[rule.deep.more]]
x = 2
[last]'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("name",), 2),
        (("description",), 3),
        (("fake",), None),
        (("provenance",), 7),
        (("provenance", "odd key", "x.y"), 8),
        (("provenance", "list"), 9),
        (("rule",), 13),
        (("rule", 0), 13),
        (("rule", 0, "forms"), 14),
        (("rule", 0, "params", "power", "block"), 15),
        (("rule", 0, "nothing"), 13),
        (("rule", 1), 16),
        (("rule", 1, "forms", 0), 17),
        (("rule", 1, "params", "power"), 20),
        (("rule", 1, "params", "power", "block"), 21),
        (("rule", 1, "deep"), 22),
        (("rule", 1, "deep", "more", 1, "x"), 26),
        (("last",), 27),
        ((), None),
    ],
)
def test_lines(path, line):
    assert line_of(TEXT, path) == line


def test_a_long_text_is_read_quickly():
    text = "".join(f"[[rule]]\nforms = ['power'] # {i}\n" for i in range(20_000))
    assert lines_of(text)["rule", 19_999, "forms"] == 40_000
