"""The coverage table of the documentation, from what the zoo found.

python -m tests.zoo.coverage build/zoo.jsonl --out docs/coverage.md
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections import Counter, defaultdict
from typing import Any

HEAD = """# Coverage

Made by `make zoo`; do not edit. Every architecture of transformers {version} that our rules make small enough for a CPU
and for which arguments are found, with random weights: a forward without a cache. Tried here: `attn_implementation`
{attentions}; {settings}.

*Sites* are the attentions that an eager run was seen to execute (SDPA calls, and softmaxes whose result is multiplied
with another tensor), counted without the backend. *Found* are those that the backend read and rewrote, or left to
SDPA's own kernels because they have no mask; *refused* those that it left alone, with the reason below. *Difference* is
the largest one of all outputs to the uncompiled model, over the largest value, in float32.

"""
SETTINGS = {"whole": "no padding", "left": "padding on the left", "right": "padding on the right"}


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The trials in a file of lines; of one that was made several times, the last."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["name"], row["attention"], row["setting"]] = row
    return sorted(found.values(), key=lambda row: (row["name"], row["attention"], row["setting"]))


def page(rows: list[dict[str, Any]], version: str) -> str:
    # what failed before its attentions were counted is shown as well
    ran = [row for row in rows if row["verdict"] == "error" or (row["verdict"] != "not run" and row["sites"])]
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in ran:
        by_name[row["name"]].append(row)
    attentions = " and ".join(f'"{one}"' for one in dict.fromkeys(row["attention"] for row in rows))
    settings = ", ".join(SETTINGS[one] for one in dict.fromkeys(row["setting"] for row in rows))
    head = HEAD.format(version=version, attentions=attentions, settings=settings)
    lines = [head, _summary(rows, ran, by_name), "\n## By architecture\n"]
    lines.append("| architecture | sites | found | refused | predicates | difference | not right |")
    lines.append("|---|---|---|---|---|---|---|")
    lines += [_line(name, of_one) for name, of_one in sorted(by_name.items())]
    lines += ["\n## Why attentions were refused\n", *_reasons(ran), ""]
    return "\n".join(lines)


def _summary(rows: list[dict[str, Any]], ran: list[dict[str, Any]], by_name: dict[str, list]) -> str:
    verdicts = Counter(row["verdict"] for row in ran)
    sites, found, refused = (sum(row[what] for row in ran) for what in ("sites", "found", "refused"))
    wrong = verdicts["differs"] + verdicts["error"] + verdicts["unseen"]
    without = len({row["name"] for row in rows} - set(by_name))
    return (
        f"{len(by_name)} architectures with attention, {len(ran)} trials, {sites} attentions: {found} found "
        f"({found / max(sites, 1):.1%}), {refused} refused with a reason; {wrong} trials with anything else. "
        f"{without} more architectures have no attention, or were not built or run.\n"
    )


def _line(name: str, rows: list[dict[str, Any]]) -> str:
    predicates = Counter(text for row in rows for text in row["predicates"])
    shown = ", ".join(f"`{text.replace('|', chr(92) + '|')}`" for text, _ in predicates.most_common(3))
    shown += ", ..." if len(predicates) > 3 else ""
    worst = max((row["difference"] for row in rows if row["difference"] is not None), default=None)
    wrong = [f"{row['attention']} {row['setting']}: {row['error'] or row['verdict']}" for row in rows
             if row["verdict"] in ("differs", "error", "unseen")]  # fmt: skip
    counts = [sum(row[what] for row in rows) for what in ("sites", "found", "refused")]
    difference = "" if worst is None else f"{worst:.1e}"
    return f"| {name} | {' | '.join(map(str, counts))} | {shown} | {difference} | {'; '.join(wrong)[:200]} |"


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    who: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for reason in row["reasons"]:
            who[reason.split(" x ", 1)[1]].add(row["name"])
    ordered = sorted(who.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"- {reason}: {', '.join(sorted(names))}" for reason, names in ordered] or ["None was."]


def main(argv: list[str] | None = None) -> int:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/coverage.md"))
    options = parser.parse_args(argv)
    options.out.write_text(page(read(options.results), transformers.__version__), encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
