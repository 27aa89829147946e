"""The suite, recorded, and the page made from what is recorded.

python -m tests.conformance                    # all columns, on the CPU, into recorded.json and docs/conformance.md
python -m tests.conformance --device cuda      # on a GPU, beside what is recorded of the CPU
python -m tests.conformance --page             # the page alone
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDED, PAGE = HERE / "recorded.json", HERE.parents[1] / "docs" / "conformance.md"
TEXT = """# Conformance

Public bug reports of other software, each as a row of [`tests/conformance`](../tests/conformance) that can be run.
"Inductor" is `torch.compile` on attention written out in PyTorch; "FlexAttention" is the same with `flex_attention`,
compiled as its documentation says; "effattn" is this backend on the written attention, and on FlexAttention's call.

- **right**: results, and gradients if the report is about them, equal float64 up to rounding; a kernel replaced the
  attention; nothing was compiled too often.
- **right, as written**: right, but all scores are computed: the attention was not found, or was left alone.
- **compiled n times**: more often than once static and once dynamic. **memory for every pair**: a tensor has an element
  for each query and key.
- **needs**: hardware that the run did not have; **-**: does not apply.

A bug may be fixed in the version that ran here. Tests run effattn's columns (`tests/conformance/test_rows.py`);
`make conformance` runs all of them and makes this page from [`recorded.json`](../tests/conformance/recorded.json).
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="rows whose name holds this; nothing is recorded")
    parser.add_argument("--page", action="store_true", help="make the page from what is recorded")
    options = parser.parse_args(argv)
    if not options.page:
        found = recorded(options.device, options.only)
        if options.only:
            return 0
        records = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        RECORDED.write_text(json.dumps(records | {options.device: found}, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RECORDED.read_text())))
    return 0


def recorded(device: str, only: str) -> dict[str, Any]:
    """Outcomes by row and column."""
    os.environ.setdefault("TRITON_INTERPRET", "0" if device == "cuda" else "1")
    import torch

    from tests.conformance.rows import ROWS
    from tests.conformance.running import COLUMNS, run

    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, list[str]]] = {}
    for row in ROWS:
        if only not in row.name:
            continue
        rows[row.name] = {}
        for column in COLUMNS:
            outcome = run(row, column, torch.device(device))
            rows[row.name][column] = [outcome.verdict, outcome.detail]
            print(f"{row.name} | {column}: {outcome.verdict} {outcome.detail}", flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"date": today, "torch": torch.__version__, "device": name, "rows": rows}


def page(records: dict[str, Any]) -> str:
    """A table for each device."""
    parts = [TEXT]
    for device, record in records.items():
        columns = list(next(iter(record["rows"].values())))
        parts.append(f"## {device.upper()}\n\n{record['device']}, torch {record['torch']}, {record['date']}\n")
        lines = [["complaint", *columns], ["---"] * (len(columns) + 1)]
        lines += [[name, *(row[column][0] for column in columns)] for name, row in record["rows"].items()]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
