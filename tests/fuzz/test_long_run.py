"""The long run: what is kept, recorded, and made into a page."""

from __future__ import annotations

from dataclasses import asdict, replace

from tests.fuzz import page, record
from tests.fuzz.drawing import numbered
from tests.fuzz.record import Row


def row(number: int, verdict: str, target: str = "triton") -> Row:
    return Row(1, number, asdict(numbered(1, number, target)), verdict, "off by 1" if verdict == "wrong" else "")


def test_what_is_finished_is_not_tried_again(tmp_path):
    path = tmp_path / "out.jsonl"
    other = replace(row(3, "found"), case={**row(3, "found").case, "queries": 999})
    rows = [row(0, "found"), row(1, "wrong"), row(2, "too slow"), other, row(4, "found", "portable")]
    path.write_text("\n".join(one.line() for one in rows))
    cases = {number: numbered(1, number, "triton") for number in range(5)}
    assert list(record.finished(path, cases, 1)) == [0]


def test_each_target_has_its_record(tmp_path):
    path = tmp_path / "recorded.json"
    for target in ("triton", "portable", "triton"):
        rows = [row(0, "found", target), row(1, "wrong", target), row(2, "too slow", target)]
        record.write(path, target, record.record(rows))
    found = record.read(path)
    assert list(found) == ["portable", "triton"]
    assert found["triton"]["verdicts"] == {
        "found": 1,
        "refused": 0,
        "nothing": 0,
        "wrong": 1,
        "too slow": 1,
        "no case": 0,
    }
    assert [failure["number"] for failure in found["triton"]["failures"]] == [1]


def test_the_page_has_the_recorded_table():
    text = page.PAGE.read_text()
    assert page.made(text, record.read(page.RECORDED)) == text
