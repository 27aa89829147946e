"""``effattn bench``: what is read, printed and written, and how it ends."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from effattn.bench import peers
from effattn.cli.main import app

SMALL = ("--tokens", "32,48", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--seconds", "0.01")
ON_CPU = ("--device", "cpu", "--dtype", "float32")


def run(*args, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def test_a_table_json_and_a_picture(tmp_path):
    told, picture = tmp_path / "bench.json", tmp_path / "roof.svg"
    found = run(*SMALL, *ON_CPU, "--mask", "window:9", "--json", told, "--plot", picture)
    assert "window:9, N 32: forward" in found.stdout
    assert "window:9, N 48: forward" in found.stdout
    assert "left out: FlexAttention, which" in found.stdout
    assert "window:9, N 48: forward, eager" in found.stderr  # progress, in a log
    body = json.loads(told.read_text())
    assert body["about"]["setting"]["heads"] == 4
    assert {row["peer"] for row in body["rows"] if row["ms"]} == {"effattn", "SDPA", "eager"}
    assert picture.read_text().startswith("<svg")


def test_a_mask_of_ones_own(tmp_path):
    code = "def even(b, h, q_idx, kv_idx):\n    return (kv_idx <= q_idx) & (kv_idx % 2 == 0)\n"
    (tmp_path / "masks.py").write_text(code)
    asked = ("--peers", "effattn,eager", "--backward")
    found = run(*SMALL, *ON_CPU, "--mask", f"{tmp_path / 'masks.py'}:even", *asked)
    assert "even, N 32: backward" in found.stdout


def test_another_result_is_a_finding(monkeypatch):
    wrong = peers.Peer("SDPA", lambda given: None, lambda given: lambda q, k, v: q + 1)
    monkeypatch.setitem(peers.PEERS, "SDPA", wrong)
    found = run(*SMALL, *ON_CPU, code=1)
    assert "another result than effattn's: SDPA (causal, N 32, forward)" in found.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tokens", "many"), "whole numbers of tokens"),
        (("--tokens", ","), "give a number of tokens"),
        (("--mask", "windoww"), "unknown mask"),
        (("--mask", "nowhere.py:mask"), "there is no file nowhere.py"),
        (("--mask", "no_such_module:mask"), "cannot import no_such_module"),
        (("--score", "softcap:x"), "takes a number"),
        (("--peers", "flash"), "unknown peer 'flash'; allowed: effattn"),
        (("--kv-heads", "3"), "no multiple of 3"),
        (("--device", "cdua"), "there is no device"),
        (("--plot", "roof.png"), ".svg or .html"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(args, message, monkeypatch):
    monkeypatch.setattr("effattn.bench.run.bench", None)
    assert message in run(*ON_CPU, *args, code=2).output


def test_help_names_every_mask_and_score():
    from effattn.bench.mods import MASKS, SCORES

    text = " ".join(run("--help").stdout.split())
    for name in (*MASKS, *SCORES):
        assert name in text
