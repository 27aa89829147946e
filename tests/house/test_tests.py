"""The same bar for tests: folders that can be looked over, helpers in one place and none of them idle."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
HELPERS = TESTS / "helpers"
MOST_FILES = 15


def files() -> list[Path]:
    return sorted(path for path in TESTS.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("where", sorted({path.parent for path in files()}), ids=lambda where: where.name)
def test_folders_can_be_looked_over(where):
    held = [path.name for path in files() if path.parent == where]
    assert len(held) <= MOST_FILES, held


def test_names_of_test_files_are_unique():
    """pytest imports a test file by its name alone."""
    names = Counter(path.name for path in files() if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("helper", sorted(HELPERS.rglob("*.py")), ids=lambda path: path.stem)
def test_no_helper_is_idle(helper):
    """Whatever a helper defines is used by a test, or by another helper."""
    defined = {
        node.name
        for node in ast.parse(helper.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.decorator_list
    }
    used = {word for path in files() for word in Counter(re.findall(r"\w+", _beside_definitions(path)))}
    assert sorted(defined - used) == []


def _beside_definitions(path: Path) -> str:
    return re.sub(r"(def|class) \w+", "", path.read_text())
