"""Reading policies: what is accepted, and what each mistake is answered with."""

from __future__ import annotations

import copy
import datetime
import enum
import json
import os
import pathlib
import pickle
import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effattn.ir.site
from effattn.errors import PolicyError
from effattn.lowering.forms import FORMS
from effattn.policy import Policy, Rule
from effattn.policy.shipped import shipped

FULL = """\
schema = 1
name = "mine"
description = "with every key"

[provenance]
model = "meta/llama"
date = 2026-01-02
error = 0.125

[[rule]]  # a comment
model = ["LlamaForCausalLM", "Mistral*"]
layers = "2-29"
site = "model.layers.*"
stage = ["prefill", "decode"]
min_length = 4096
forms = ["power", "window"]
  [rule.params.power]
  block = 64
  window = 1024

[[rule]]
layers = [0, 1, 30]
forms = "exact"
"""


NESTED = {}
NESTED["again"] = NESTED


def write(tmp_path, text, name="mine.toml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_key_is_read(tmp_path):
    policy = Policy.load(write(tmp_path, FULL))
    first, second = policy.rules
    assert policy.name == "mine"
    assert policy.provenance == {"model": "meta/llama", "date": datetime.date(2026, 1, 2), "error": 0.125}
    assert first.model == ("LlamaForCausalLM", "Mistral*")
    assert first.site == ("model.layers.*",)
    assert first.preference == ("power", "window", "exact")
    assert first.min_length == 4096
    assert first.params_of("power") == FORMS["power"].params(block=64, window=1024)
    assert first.params_of("window") == FORMS["window"].params()
    assert second.layers == "0-1, 30"
    assert second.preference == ("exact",)


def test_the_name_defaults_to_the_file_name(tmp_path):
    assert Policy.load(write(tmp_path, "", "quick.toml")).name == "quick"


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b""], ids=["byte order mark", "plain"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_files_from_other_editors(tmp_path, prefix, newline):
    assert Policy.load(write(tmp_path, prefix + FULL.replace("\n", newline).encode())) == Policy.of(tomllib.loads(FULL))


def test_what_ships():
    assert shipped() == ("auto", "dhsa", "exact", "linear-hybrid", "power", "power-hybrid", "proxy", "window")
    assert Policy.of(None) is Policy.named("exact")
    assert Policy.named("exact").rules == ()
    power = Policy.named("power").rules[0]
    assert (power.preference, power.min_length) == (("power", "exact"), 4096)
    assert power.params_of("power") == FORMS["power"].params(block=128, window=2048, sinks=128)
    window = Policy.named("window").rules[0]
    assert (window.preference, window.min_length) == (("window", "exact"), 4096)
    for name in shipped():
        assert Policy.named(name).name == name
        assert Policy.named(name).description


def test_of_takes_every_source(tmp_path, monkeypatch):
    path = write(tmp_path, FULL)
    policy = Policy.load(path)
    assert Policy.of(policy) is policy
    assert Policy.of(path) == Policy.of(str(path)) == Policy.of(tomllib.loads(FULL)) == policy
    monkeypatch.chdir(tmp_path)
    assert Policy.of("mine.toml") == policy
    path.rename(tmp_path / "mine")
    assert Policy.of("mine") == policy
    write(tmp_path, "", "power")
    assert Policy.of("power") == Policy.named("power")  # a file cannot take the place of a shipped name


def test_a_policy_is_a_value():
    policy, same = Policy.of(tomllib.loads(FULL)), Policy.of(tomllib.loads(FULL))
    assert policy == same
    assert hash(policy) == hash(same)
    assert policy != Policy.named("power")
    assert {policy: 1}[same] == 1
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert copy.deepcopy(policy) == policy
    assert len({*policy.rules, *same.rules}) == 2
    with pytest.raises(ValueError, match="frozen"):
        policy.name = "other"


# each row: text of the file, line that must be named (None: no line), words that must appear
BAD_FILES = [
    ('nam = "x"', 1, ["key nam", "unknown key 'nam'", "did you mean 'name'", "Allowed: schema, name"]),
    ("schema = 2", 1, ["key schema", "reads schema 1", "got 2"]),
    ('schema = "1"', 1, ["expected an integer", "'1' (a string)"]),
    ("\nname = 5", 2, ["key name", "expected a string, got 5 (an integer)"]),
    ('name = ""', 1, ["key name", "at least 1 character"]),
    ('[rule]\nforms = ["power"]', 1, ["write [[rule]] instead of [rule]"]),
    ("rule = 5", 1, ["key rule", "expected a list", "5 (an integer)"]),
    ('\n\n[[rule]]\nmodel = "X"', 3, ["key rule[0]", "the key 'forms' is missing"]),
    ('[[rule]]\nforms = ["powr"]', 2, ["key rule[0].forms[0]", "unknown form 'powr'", "did you mean 'power'"]),
    ("[[rule]]\nforms = []", 2, ["the list is empty"]),
    ("[[rule]]\nforms = 3", 2, ["expected a string or a list of strings", "3 (an integer)"]),
    ("[[rule]]\nforms = [3]", 2, ["rule[0].forms[0]", "expected a string"]),
    ('[[rule]]\nforms = ["power", "power"]', 2, ["forms[1]", "named twice"]),
    ('[[rule]]\nforms = ["exact", "power"]', 2, ["forms[1]", "never reached"]),
    ('[[rule]]\nforms = "power"\nlayer = "1"', 3, ["unknown key 'layer' of a rule", "did you mean 'layers'"]),
    ('[[rule]]\nforms = "power"\nlayers = "7-3"', 3, ["rule[0].layers", "'7-3' runs backwards", "3-7"]),
    ('[[rule]]\nforms = "power"\nlayers = "1;3"', 3, ["'1;3'", "is not a layer or a range", '"0-3, 8, 20-"']),
    ('[[rule]]\nforms = "power"\nlayers = ""', 3, ["rule[0].layers", "is not a layer"]),
    ('[[rule]]\nforms = "power"\nlayers = [1, -1]', 3, ["counted from 0", "-1"]),
    ('[[rule]]\nforms = "power"\nlayers = [true]', 3, ["rule[0].layers", "True"]),
    ('[[rule]]\nforms = "power"\nlayers = 1.5', 3, ["rule[0].layers", "1.5"]),
    ('[[rule]]\nforms = "power"\nlayers = "999999999"', 3, ["beyond 100000"]),
    ('[[rule]]\nforms = "power"\nstage = "prefil"', 3, ["unknown stage 'prefil'", "'prefill'", "encoder"]),
    ('[[rule]]\nforms = "power"\nmin_length = -4', 3, ["min_length", "greater than or equal to 0", "-4"]),
    ('[[rule]]\nforms = "power"\nmin_length = 4.5', 3, ["min_length", "expected an integer", "4.5 (a float)"]),
    ('[[rule]]\nforms = "power"\nmin_length = true', 3, ["min_length", "expected an integer", "a boolean"]),
    (
        '[[rule]]\nforms = "power"\n[rule.params.power]\nwindw = 1',
        4,
        ["key rule[0].params.power.windw", "unknown parameter 'windw' of form 'power'", "'window'", "block"],
    ),
    ('[[rule]]\nforms = "power"\nparams.power.block = 100', 3, ["must be a power of two, got 100"]),
    ('[[rule]]\nforms = "power"\n[rule.params.power]\nblock = 8', 4, ["params.power.block", "16", "got 8"]),
    ('[[rule]]\nforms = "power"\n[rule.params.power]\nblock = "128"', 4, ["expected an integer", "'128' (a string)"]),
    ('[[rule]]\nforms = "power"\n[rule.params.power]\n\nblock = 48', 3, ["key rule[0].params.power:", "power of two"]),
    ('[[rule]]\nforms = "power"\nparams = { power = 5 }', 3, ["rule[0].params.power", "expected a table"]),
    ('[[rule]]\nforms = "power"\nparams = 5', 3, ["rule[0].params", "expected a table"]),
    ('[[rule]]\nforms = "power"\n[rule.params.window]\nwindow = 5', 3, ["sets 'window'", "allows only power"]),
    ('[[rule]]\nforms = "power"\n[rule.params.widow]\nwindow = 5', 3, ["unknown form 'widow'", "'window'"]),
    ('[[rule]]\nforms = "exact"\n[rule.params.exact]\nblock = 5', 4, ["unknown parameter 'block'", "Allowed: kernel"]),
    (
        "[[rule]]\nforms = 'power'\nsite = 3",
        3,
        ["rule[0].site", "expected a string or a list of strings", "3 (an integer)"],
    ),
    ("provenance = 3", 1, ["provenance", "expected a table"]),
    ('[[rule]]\nforms = "exact"\n\n[[rule]]\nforms = "powe"', 5, ["rule[1].forms[0]"]),
    ("name = ", 1, ["not valid TOML"]),
    ('name = "x"\nname = "y"', 2, ["not valid TOML", "overwrite"]),
    ('name = "x"\n\n[[rule]\n', 3, ["not valid TOML", "[[rule]"]),
    ("x = [[[[[" + "[" * 100_000, None, ["nested too deeply"]),
    ("x = " + "9" * 5000, None, ["not valid TOML"]),
    (b"name = '\n\xff'", 2, ["not UTF-8"]),
    ("#" * (1 << 20) + "\n", None, ["1 MiB"]),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD_FILES, ids=[str(i) for i in range(len(BAD_FILES))])
def test_a_mistake_names_file_line_key_and_what_is_allowed(tmp_path, text, line, words):
    path = write(tmp_path, text)
    with pytest.raises(PolicyError) as caught:
        Policy.of(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for word in words:
        assert word in message
    assert (
        (f"line {line}, " in message or f"line {line}: " in message)
        if line
        else ("line" not in message.removeprefix(str(path)))
    )


def test_all_mistakes_are_told_at_once_in_order_of_lines(tmp_path):
    path = write(tmp_path, 'nam = 1\n[[rule]]\nstage = "x"\nforms = "y"\n[rule.params.power]\nblok = 1\n')
    with pytest.raises(PolicyError, match="4 problems") as caught:
        Policy.load(path)
    lines = [part.split(",")[0].strip() for part in str(caught.value).splitlines()[1:]]
    assert lines == ["line 1", "line 3", "line 4", "line 6"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "powr",
            [
                "unknown policy 'powr'",
                "did you mean 'power'",
                "auto, dhsa, exact, linear-hybrid, power",
                "path of a .toml",
            ],
        ),
        ("zzz", ["unknown policy 'zzz'", "auto, dhsa, exact, linear-hybrid, power"]),
        ("nowhere/policy.toml", ["nowhere/policy.toml", "No such file"]),
        (pathlib.Path("nowhere.toml"), ["nowhere.toml", "No such file"]),
        ("a\0b.toml", ["cannot read"]),
        ("/", ["not a regular file"]),
        (5, ["a name, a path, a dict or a Policy", "5 (an integer)"]),
        ([], ["a name, a path, a dict or a Policy"]),
        ({5: 1}, ["policy dict", "keys are strings"]),
        ({"self": 1}, ["policy dict, key self", "unknown key"]),
        ({"rule": [{"forms": ["power"], "params": {5: {}}}]}, ["unknown form '5'"]),
        ({"rule": [{"forms": ["power"], "params": {"power": {5: 1}}}]}, ["rule[0].params.power"]),
        ({"provenance": {"x": None}}, ["key provenance.x", "what TOML holds", "nothing"]),
        ({"provenance": {"x": [{"y": {1}}]}}, ["key provenance.x[0].y", "{1} (set)"]),
        ({"provenance": {"x": datetime.time(1, tzinfo=datetime.UTC)}}, ["key provenance.x", "a time"]),
        ({"provenance": {"x": "\ud800"}}, ["key provenance.x", "a string"]),
        ({"provenance": NESTED}, ["key provenance", "nested too deeply"]),
        ({"name": "x" * 500}, ["key name", "200"]),
        ({"schema_version": 1}, ["unknown key 'schema_version'", "'schema'"]),
    ],
    ids=str,
)
def test_bad_sources(source, words):
    with pytest.raises(PolicyError) as caught:
        Policy.of(source)
    for word in words:
        assert word in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(PolicyError, match="not a regular file"):
        Policy.load(tmp_path / "pipe.toml")


def test_constructing_directly_raises_the_same_error():
    with pytest.raises(PolicyError, match=r"rule\[0\].forms\[0\].*did you mean 'power'"):
        Policy(rule=[{"forms": ["powr"]}])
    assert Policy(rule=[Rule(forms="power")]) == Policy.of({"rule": [{"forms": ["power"]}]})


def test_unknown_shipped_name():
    with pytest.raises(PolicyError, match="did you mean 'window'"):
        Policy.named("windows")


# --- what is written reads back the same -----------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
zones = st.none() | st.integers(-1439, 1439).map(lambda minutes: datetime.timezone(datetime.timedelta(minutes=minutes)))
dates = st.dates() | st.times() | st.datetimes(timezones=zones)
scalars = st.text(st.characters(exclude_categories=["Cs"])) | st.booleans() | st.integers() | st.floats() | dates
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)
facts = st.dictionaries(text, values, max_size=4)


def same(one, other):
    """Equal in value and type; what is not a number is equal to itself."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and list(one) == list(other) and all(same(one[name], other[name]) for name in one)
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


@st.composite
def rules(draw):
    forms = draw(st.lists(st.sampled_from(["power", "window"]), unique=True, min_size=1))
    body = {"forms": forms + draw(st.sampled_from([[], ["exact"]]))}
    if draw(st.booleans()):
        body["model"] = draw(text | st.lists(text, min_size=1, max_size=3))
    if draw(st.booleans()):
        body["layers"] = draw(st.sampled_from(["0", "3-", "5 - 9, 1"]) | st.lists(st.integers(0, 99), min_size=1))
    if draw(st.booleans()):
        body["site"] = draw(text | st.lists(text, min_size=1, max_size=3))
    if draw(st.booleans()):
        body["stage"] = draw(st.lists(st.sampled_from(effattn.ir.site.STAGES), unique=True, min_size=1))
    if draw(st.booleans()):
        body["min_length"] = draw(st.integers(0, 2**40))
    if draw(st.booleans()):
        body["params"] = {forms[0]: {"sinks": draw(st.integers(0, 1000))}}
    return body


@settings(deadline=None, max_examples=60)
@given(name=text, description=text, provenance=facts, body=st.lists(rules(), max_size=3))
def test_toml_round_trip(name, description, provenance, body):
    policy = Policy.of({"name": name, "description": description, "provenance": provenance, "rule": body})
    again = Policy.of(tomllib.loads(policy.to_toml()))
    assert again == policy
    assert same(policy.provenance, provenance)
    assert same(again.to_dict(), policy.to_dict())
    assert same(json.loads(json.dumps(policy.to_dict(json=True), allow_nan=False)), policy.to_dict(json=True))
    assert again.to_toml() == policy.to_toml()


def test_what_only_looks_like_a_plain_value():
    """NumPy's numbers are floats, with another repr; members of an enum are strings."""
    policy = Policy.of({"provenance": {"error": np.float64(0.5), "stage": Stage.FIRST, "sizes": (1, 2)}})
    assert same(policy.provenance, {"error": 0.5, "stage": "first", "sizes": [1, 2]})
    assert Policy.of(tomllib.loads(policy.to_toml())) == policy


class Stage(enum.StrEnum):
    FIRST = "first"


def test_a_rule_can_be_pasted_into_a_file(tmp_path):
    rule = Policy.named("power").rules[0]
    assert Policy.load(write(tmp_path, f"schema = 1\n\n{rule.to_toml()}")).rules == (rule,)
