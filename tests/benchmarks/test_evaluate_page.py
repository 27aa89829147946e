"""The pages of results say what the committed JSON says."""

from __future__ import annotations

import pytest

from benchmarks import evaluate_page
from effattn.errors import EvaluationError


@pytest.mark.parametrize("page", evaluate_page.PAGES, ids=lambda page: page.name)
def test_the_page_is_what_its_command_makes(page):
    written = page.read_text(encoding="utf-8")
    made = evaluate_page.renewed(written, evaluate_page.results(evaluate_page.PAGES[page], page))
    assert written == made
    assert "| tokens | policy |" in made


def test_pages_and_folders_that_are_none(tmp_path, capsys):
    with pytest.raises(EvaluationError, match="holds no results"):
        evaluate_page.results(tmp_path, tmp_path / "page.md")
    with pytest.raises(EvaluationError, match="between which results go"):
        evaluate_page.renewed("# A page", "figures")
    assert evaluate_page.main([str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
