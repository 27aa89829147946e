"""What docs/policies.md shows is what happens."""

from __future__ import annotations

import pathlib
import re
import tomllib

import pytest

from effattn.errors import PolicyError
from effattn.ir.site import STAGES
from effattn.lowering.forms import FORMS
from effattn.policy import Policy, Rule
from effattn.policy.shipped import shipped

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "policies.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_are_valid():
    (example,) = blocks("toml")
    policy = Policy.of(tomllib.loads(example))
    policy.check_layers(32)
    assert policy.rules[0].preference == ("exact",)
    assert policy.rules[1].params_of("power").window == 1024


def test_the_error_shown_is_the_error_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (wrong,), (shown,) = blocks("toml-wrong"), blocks("text")
    pathlib.Path("bad.toml").write_text(wrong)
    with pytest.raises(PolicyError) as caught:
        Policy.load("bad.toml")
    # forms may be added without touching the page
    told = str(caught.value).replace(f"Allowed: {', '.join(FORMS)}", "Allowed: exact, window, power")
    assert f"error: {told}\n" == shown


@pytest.mark.parametrize("name", [*Rule.model_fields, *(f.alias or n for n, f in Policy.model_fields.items()), *STAGES])
def test_every_key_is_documented(name):
    assert re.search(rf"`\[*(rule\.)?{name}[`.\]]", PAGE)


def test_every_shipped_policy_is_documented():
    for name in shipped():
        assert f"| `{name}` |" in PAGE
