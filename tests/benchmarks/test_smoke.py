"""Every benchmark runs, in small, and what it writes can be read and shown."""

from __future__ import annotations

import importlib
import json
import pathlib

import pytest
import torch

from benchmarks import gpu_all, harness, report, tables

TINY = ["--tiny", "--device", "cpu", "--repeats", "1"]
# benchmark -> (more options, the largest difference from the reference that rounding explains)
BENCHMARKS = {
    "prefill_llama": (["--kinds", "left padding"], 1e-5),
    "selectors": ([], 1e-5),
    "decode_static": ([], 1e-5),
    "train_step": (["--kinds", "left padding"], 1e-6),
    "linear_lightning": ([], 1e-5),
    "host": ([], 0.0),
    "kernels": (["--only", "documents,alibi,sinks"], 1e-5),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small work is done sooner by one thread than by many that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(name: str, folder: pathlib.Path, options: list[str]) -> dict:
    path = folder / f"{name}.json"
    assert importlib.import_module(f"benchmarks.{name}").run([*TINY, *options, "--out", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


SLOW = ("decode_static", "train_step")  # most of their time is Inductor's


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in BENCHMARKS])
def test_runs_and_variants_agree(name, tmp_path):
    options, tolerance = BENCHMARKS[name]
    result = run(name, tmp_path, options)
    assert {row["variant"] for row in result["rows"]} >= set(result["against"])
    assert any("effattn" in row["variant"] for row in result["rows"])
    for row in result["rows"]:
        assert row["ms"] > 0, row
        assert row["difference"] is None or row["difference"] <= tolerance, row
    assert result["ratios"]
    text = report.page(report.load(tmp_path))
    assert "Tiny sizes" in text
    assert all(row["variant"] in text for row in result["rows"])


def test_a_compilation_is_counted_in_a_process_of_its_own(tmp_path):
    result = run("compile_time", tmp_path, ["--cases", "empty caches"])
    whole, passes = result["rows"]
    assert 0 < passes["ms"] < whole["ms"]
    assert whole["more"]["sites"] == "2 of 2"


def test_compilations_of_architectures_are_held_against_inductors(tmp_path):
    result = run("compile_zoo", tmp_path, [])
    cases = {row["case"]: row for row in result["rows"] if row["variant"] == "effattn"}
    assert list(cases) == ["llama", "bert", "median of 2"]
    assert cases["llama"]["ms"] > 0
    assert cases["median of 2"]["more"]["time over Inductor's"] > 0


def suite(tmp_path, *options: str) -> harness.Suite:
    given = harness.parser("test").parse_args([*options, "--device", "cpu", "--out", str(tmp_path / "test.json")])
    made = harness.Suite("prefill_llama", given, {}, against=("slow",))
    for variant, ms in (("slow", 4.0), ("fast", 2.0)):
        made.add(harness.Row("case", variant, ms))
    return made


def test_one_that_fails_does_not_stop_the_others(tmp_path):
    made = suite(tmp_path, "--repeats", "1")

    def fails():
        raise ValueError("no such thing")

    made.measure("other", "bad", lambda: fails)
    made.measure("other", "good", lambda: lambda: torch.ones(2))
    bad, good = made.rows[-2:]
    assert bad.error == "ValueError: no such thing"
    assert bad.ms is None
    assert good.error is None
    assert good.ms is not None
    assert made.finish() == 1


def test_bars_are_held_against_the_better_one(tmp_path):
    made = suite(tmp_path)
    made.add(harness.Row("case", "ours", 3.0))
    made.bar("case", "ours", "slow", 0.8)
    made.bar("case", "ours", ("slow", "fast"), 1.0)
    made.bar("case", "ours", "absent", 1.0)
    made.bar("case", "ours", (), 2.5)
    verdicts = [(bar["reached"], tables.verdict(bar)) for bar in made.reached()]
    assert verdicts == [(0.75, "met"), (1.5, "missed"), (None, "not measured"), (3.0, "missed")]
    asked = [line[2] for line in tables.bars([made.to_dict()])[1]]
    assert asked == [f"time <= {text}" for text in ("0.8 of slow's", "1 of slow and fast's", "1 of absent's", "2.5 ms")]


def test_nothing_starts_when_time_is_up(tmp_path):
    made = suite(tmp_path, "--seconds", "0")
    assert made.measure("case", "late", lambda: pytest.fail("was started")) is None
    assert "no time left for case, late" in made.notes


def test_differences_see_what_is_not_a_number():
    measuring = importlib.import_module("benchmarks.measuring")
    nan, one = torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 1.5])
    assert measuring.largest_difference(nan, one) == 0.5
    assert measuring.largest_difference(nan, torch.ones(2)) == torch.inf


def test_time_is_shared_by_those_that_are_left():
    names = list(gpu_all.BENCHMARKS)
    assert gpu_all.shares(names[-1:], 100.0) == 100.0
    left = 100.0
    for i in range(len(names)):
        left -= gpu_all.shares(names[i:], left)
    assert abs(left) < 1e-9


def test_a_page_needs_results(tmp_path):
    assert report.main([str(tmp_path), "--out", str(tmp_path / "page.md")]) == 1
    assert not (tmp_path / "page.md").exists()
