"""docs/fuzzing.md's table, made from recorded.json.

python -m tests.fuzz.page                  # after a run with --record tests/fuzz/recorded.json
python -m tests.fuzz.page a.json b.json    # records of targets that were made elsewhere are put in there first
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.fuzz.record import VERDICTS, read, write

HERE = Path(__file__).parent
PAGE, RECORDED = HERE.parents[1] / "docs" / "fuzzing.md", HERE / "recorded.json"
BEGIN, END = "<!-- made by python -m tests.fuzz.page -->", "<!-- end -->"
ROWS = ("date", "seed", "cases", *VERDICTS, "masks compared", "calls of kernels", "torch", "triton", "machine")


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
    for made_elsewhere in sys.argv[1:]:
        for target, body in read(Path(made_elsewhere)).items():
            write(RECORDED, target, body)
    PAGE.write_text(made(PAGE.read_text(), read(RECORDED)))
