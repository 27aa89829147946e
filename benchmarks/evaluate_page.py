"""The results of ``effattn evaluate`` in pages of the documentation.

    python -m benchmarks.evaluate_page

Replaces what stands between a page's two marks by tables made from the JSON files of its folder: figures are never
typed by hand. The rest of the page is prose.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from effattn.errors import EvaluationError
from effattn.evaluate import Evaluation
from effattn.evaluate.show.tables import heading, tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
# page -> the folder of its results
PAGES = {DOCS / "evaluate.md": RESULTS / "evaluate_smollm2", DOCS / "forms.md": RESULTS / "evaluate_shipped"}
BEGIN, END = "<!-- results: made by python -m benchmarks.evaluate_page, do not edit -->", "<!-- end of results -->"


def results(folder: pathlib.Path, page: pathlib.Path) -> str:
    """The tables of every JSON file of a folder, each with its picture, in Markdown.

    Raises:
        EvaluationError: the folder holds no results, or files that are none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise EvaluationError(f"{folder} holds no results; make some: effattn evaluate --out OUT")
    return "\n\n".join(section(path, page) for path in files)


def section(path: pathlib.Path, page: pathlib.Path) -> str:
    """One file of results."""
    done = Evaluation.load(path)
    parts = [f"{heading(done)} ([all figures]({_link(path, page)}))."]
    for table in tables(done):
        parts += [f"**{table.title}**", table.markdown()]
    parts += ["\n".join(f"- {note}" for note in done.notes)] if done.notes else []
    if (picture := path.with_suffix(".png")).exists():
        parts.append(f"![errors and recovered mass by layer, passkeys by depth]({_link(picture, page)})")
    return "\n\n".join(parts)


def _link(path: pathlib.Path, page: pathlib.Path) -> str:
    return pathlib.PurePath(os.path.relpath(path, page.parent)).as_posix()


def renewed(text: str, between: str) -> str:
    """The page with other results. Raises EvaluationError where it lacks the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise EvaluationError(f"the page has no lines {BEGIN!r} and {END!r} between which results go")
    return f"{before}{BEGIN}\n\n{between}\n\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?", help="results for --page, instead of all pages' own")
    parser.add_argument("--page", type=pathlib.Path, help="default: docs/evaluate.md")
    options = parser.parse_args(argv)
    given = options.folder is not None or options.page is not None
    page = options.page or next(iter(PAGES))
    chosen = {page: options.folder or PAGES.get(page, next(iter(PAGES.values())))} if given else PAGES
    try:
        for page, folder in chosen.items():
            text = renewed(page.read_text(encoding="utf-8"), results(folder, page))
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page}")
    except (EvaluationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
