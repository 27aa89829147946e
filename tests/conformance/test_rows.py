"""effattn's columns of the suite, and the page that is made from a recorded run of all."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conformance import __main__ as suite
from tests.conformance.rows import ROWS
from tests.conformance.running import COLUMNS, RIGHT, UNFUSED, run

OURS = [column for column in COLUMNS if column.startswith("effattn")]


@pytest.mark.parametrize("column", OURS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.complaint)
def test_row(row, column):
    outcome = run(row, column, torch.device("cpu"), rest="eager")
    if outcome.verdict == "-" or outcome.verdict.startswith("needs"):
        pytest.skip(f"{row.name}: {outcome.verdict}")
    assert outcome.verdict == (UNFUSED if row.left else RIGHT), outcome.detail


def test_the_page_is_made_from_the_record():
    record = json.loads(suite.RECORDED.read_text())
    assert suite.PAGE.read_text() == suite.page(record)
    assert list(record["cpu"]["rows"]) == [row.name for row in ROWS]
