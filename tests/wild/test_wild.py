"""Attention as it is written outside transformers: each row found and read, or left alone with its reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import diffusion
import images
import language
import layouts
import masking
import modules
from row import check

ROWS = [row for module in (images, language, diffusion, masking, modules, layouts) for row in module.ROWS]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_found_read_and_unchanged(row):
    check(row, train=False)


@pytest.mark.parametrize("row", [row for row in ROWS if row.train], ids=str)
def test_gradients_with_symbolic_lengths(row):
    check(row, train=True)
