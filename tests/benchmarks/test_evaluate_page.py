"""The page of results says what the committed JSON says."""

from __future__ import annotations

import pytest

from benchmarks import evaluate_page
from effattn.errors import EvaluationError


def test_the_page_is_what_its_command_makes():
    made = evaluate_page.renewed(
        evaluate_page.PAGE.read_text(encoding="utf-8"), evaluate_page.results(evaluate_page.FOLDER, evaluate_page.PAGE)
    )
    assert evaluate_page.PAGE.read_text(encoding="utf-8") == made
    assert "| tokens | policy |" in made


def test_pages_and_folders_that_are_none(tmp_path, capsys):
    with pytest.raises(EvaluationError, match="holds no results"):
        evaluate_page.results(tmp_path, evaluate_page.PAGE)
    with pytest.raises(EvaluationError, match="between which results go"):
        evaluate_page.renewed("# A page", "figures")
    assert evaluate_page.main([str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
