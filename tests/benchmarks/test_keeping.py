"""Cases of an earlier run are kept where a later one had no time; the page and README.md say what is in the files."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks import gpu_all, harness, keeping, report

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def suite(path: pathlib.Path, costs: dict[tuple[str, str], float], *options: str) -> harness.Suite:
    """A finished run that measured ``costs``, by case and variant, into ``path``."""
    given = harness.parser("test").parse_args(["--device", "cpu", "--out", str(path), *options])
    made = harness.Suite("prefill_llama", given, {"size": 1}, against=("slow",))
    for case in dict.fromkeys(case for case, _ in costs):
        made.bar(case, "fast", "slow", 1.0)
    for (case, variant), ms in costs.items():
        made.add(harness.Row(case, variant, ms))
    return made


def variants(result: dict, case: str) -> dict[str, tuple[float, int]]:
    return {row["variant"]: (row["ms"], row["run"]) for row in result["rows"] if row["case"] == case}


WHOLE = {("a", "slow"): 4.0, ("a", "fast"): 2.0, ("b", "slow"): 8.0, ("b", "fast"): 6.0}


def test_a_case_is_kept_or_replaced_as_a_whole(tmp_path):
    path = tmp_path / "result.json"
    suite(path, WHOLE)
    later = suite(path, {("a", "slow"): 40.0, ("a", "fast"): 10.0, ("b", "slow"): 80.0})
    later.note("no time left for b, fast")
    later.save()
    result = keeping.read(path)
    assert variants(result, "a") == {"slow": (40.0, 1), "fast": (10.0, 1)}
    assert variants(result, "b") == {"slow": (8.0, 0), "fast": (6.0, 0)}
    assert [bar["reached"] for bar in result["bars"]] == [0.25, 0.75]
    assert [ratio["time"] for ratio in result["ratios"]] == [0.25, 0.75]
    assert [run["notes"] for run in result["runs"]] == [[], []]  # b was measured after all


def test_a_run_of_which_nothing_is_left_is_forgotten(tmp_path):
    path = tmp_path / "result.json"
    suite(path, {("a", "slow"): 4.0})
    suite(path, WHOLE)
    result = keeping.read(path)
    assert len(result["runs"]) == 1
    assert {row["run"] for row in result["rows"]} == {0}


def test_nothing_is_lost_while_a_case_is_half_measured(tmp_path):
    path = tmp_path / "result.json"
    suite(path, WHOLE)
    suite(path, {("a", "slow"): 40.0})
    assert variants(keeping.read(path), "a") == {"slow": (4.0, 0), "fast": (2.0, 0)}


def test_another_problem_or_a_fresh_start_keeps_nothing(tmp_path):
    path = tmp_path / "result.json"
    suite(path, WHOLE)
    suite(path, {("a", "slow"): 1.0}, "--tiny", "--fresh")
    suite(path, WHOLE)
    assert variants(keeping.read(path), "a") == {"slow": (4.0, 0), "fast": (2.0, 0)}
    suite(path, {("a", "slow"): 1.0}, "--fresh")
    assert variants(keeping.read(path), "b") == {}


def test_tiny_results_do_not_replace_others(tmp_path):
    path = tmp_path / "result.json"
    suite(path, {("a", "slow"): 1.0}, "--tiny")
    suite(path, WHOLE)
    with pytest.raises(ValueError, match="holds results of full sizes"):
        suite(path, {("a", "slow"): 1.0}, "--tiny")
    assert gpu_all.parse(["--tiny"]).out != RESULTS


def test_files_of_one_run_are_read(tmp_path):
    path = tmp_path / "result.json"
    made = suite(path, WHOLE).to_dict()
    (run,) = made.pop("runs")
    for row in made["rows"]:
        del row["run"]
    path.write_text(json.dumps({**made, **run}), encoding="utf-8")
    read = keeping.read(path)
    assert read["runs"] == [run]
    assert variants(read, "a") == {"slow": (4.0, 0), "fast": (2.0, 0)}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": 1}'])
def test_a_file_that_is_no_result_is_told(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="is no result of a benchmark"):
        keeping.read(path)


def test_two_files_are_merged(tmp_path):
    earlier, later = tmp_path / "earlier.json", tmp_path / "later.json"
    suite(earlier, WHOLE)
    suite(later, {("b", "slow"): 1.0, ("b", "fast"): 2.0})
    assert keeping.main([str(earlier), str(later), "--out", str(tmp_path / "both.json")]) == 0
    both = keeping.read(tmp_path / "both.json")
    assert variants(both, "b") == {"slow": (1.0, 1), "fast": (2.0, 1)}
    assert "| run |" in report.page([both])
    assert keeping.main([str(earlier), str(tmp_path / "none.json"), "--out", str(tmp_path / "x.json")]) == 1


def test_the_page_is_what_the_results_say():
    page = report.page(report.load(RESULTS), report.cpu_section(RESULTS))
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == page


def test_the_readme_is_what_the_results_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.with_table(readme, report.readme_table(report.load(RESULTS))) == readme
