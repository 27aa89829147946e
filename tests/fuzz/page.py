"""docs/fuzzing.md's table, made from recorded.json.

python -m tests.fuzz.page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fuzz.record import VERDICTS, read

HERE = Path(__file__).parent
PAGE, RECORDED = HERE.parents[1] / "docs" / "fuzzing.md", HERE / "recorded.json"
BEGIN, END = "<!-- made by python -m tests.fuzz.page -->", "<!-- end -->"
ROWS = ("date", "cases", *VERDICTS, "masks compared", "calls of kernels", "torch", "machine")


def table(records: dict[str, dict[str, Any]]) -> str:
    """A column for each target."""
    flat = {name: {**body, **body["verdicts"], **body["versions"]} for name, body in records.items()}
    lines = [["", *flat], ["---"] * (len(flat) + 1)]
    lines += [[row, *(_cell(body.get(row, "")) for body in flat.values())] for row in ROWS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def made(page: str, records: dict[str, dict[str, Any]]) -> str:
    """The page with the table of these records."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(records)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text(), read(RECORDED)))
