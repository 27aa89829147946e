"""docs/kernels.md shows lines of a kernel that is generated like that."""

import re
from pathlib import Path

import pytest
from specs import goldens

from effattn.lowering.kernels.generate import generate

PAGE = Path(__file__).parents[3] / "docs" / "kernels.md"
SHOWN = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_shows_code():
    assert len(SHOWN) > 5


@pytest.mark.parametrize("shown", SHOWN)
def test_lines_are_those_of_the_kernel(shown):
    assert shown in generate(goldens()["documents_hopper"])
