"""effattn's columns of the conformance suite with compiled kernels, and the rows that need a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.conformance.rows import ROWS
from tests.conformance.running import COLUMNS, RIGHT, UNFUSED, run


@pytest.mark.parametrize("column", [column for column in COLUMNS if column.startswith("effattn")])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.complaint)
def test_row(row, column):
    outcome = run(row, column, torch.device("cuda"))
    if outcome.verdict == "-" or outcome.verdict.startswith("needs"):
        pytest.skip(f"{row.name}: {outcome.verdict}")
    if row.left and outcome.verdict == "error":  # left as written, and Inductor cannot compile what is written
        assert run(row, "FlexAttention", torch.device("cuda")).verdict == "error", outcome.detail
        return
    assert outcome.verdict == (UNFUSED if row.left else RIGHT), outcome.detail
