"""Results as tables: on the screen after a run, and in Markdown for the documentation. Both read what was written."""

from __future__ import annotations

from typing import Any

WHAT = {"ms": "time", "peak_gib": "peak memory", "above_gib": "memory above weights"}
UNITS = {"ms": " ms", "peak_gib": " GiB", "above_gib": " GiB"}


def show(result: dict[str, Any]) -> None:
    """Rows and bars of one benchmark on the screen."""
    from rich.console import Console

    console = Console(width=170)
    headings, lines = rows(result)
    console.print(_rich(f"{result['name']}, {result['runs'][-1]['device']}", headings, lines, left=2))
    if result["bars"]:
        console.print(_rich("needed", *bars([result]), left=2))


def rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: one line a variant, a column for every variant that the others are compared to."""
    memory = any(row["peak_gib"] is not None for row in result["rows"])
    headings = ["case", "variant", "ms", *[f"/ {name}" for name in result["against"]]]
    headings += ["peak GiB", "above weights"] if memory else []
    headings += ["first call s", "difference", "more"]
    headings += ["run"] if len(result["runs"]) > 1 else []
    return headings, [_cells(row, result, memory) for row in result["rows"]]


def _cells(row: dict[str, Any], result: dict[str, Any], memory: bool) -> list[str]:
    costs = {other["variant"]: other["ms"] for other in result["rows"] if other["case"] == row["case"]}
    ratios = [row["ms"] / costs[name] if row["ms"] and costs.get(name) else None for name in result["against"]]
    cells = [row["case"], row["variant"], row["error"] or number(row["ms"]), *map(number, ratios)]
    cells += [number(row["peak_gib"]), number(row["above_gib"])] if memory else []
    apart = "" if row["difference"] is None else f"{row['difference']:.2g} of {row['size']:.2g}"
    more = ", ".join(f"{key} {number(value)}" for key, value in row["more"].items())
    cells += [number(row["first_s"]), apart, more]
    return [*cells, str(row["run"] + 1)] if len(result["runs"]) > 1 else cells


def bars(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: what was needed, what was reached."""
    lines = []
    for result in results:
        for bar in result["bars"]:
            over = f" of {' and '.join(bar['against'])}'s" if bar["against"] else UNITS.get(bar["what"], "")
            asked = f"{WHAT.get(bar['what'], bar['what'])} <= {bar['at_most']:g}{over}"
            lines.append([bar["case"], bar["variant"], asked, number(bar["reached"]), verdict(bar)])
    return ["case", "variant", "needed", "reached", ""], lines


def verdict(bar: dict[str, Any]) -> str:
    if bar["reached"] is None:
        return "not measured"
    return "met" if bar["reached"] <= bar["at_most"] else "missed"


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; columns that are empty everywhere are left out."""
    kept = [i for i, heading in enumerate(headings) if i < 2 or (heading and any(line[i] for line in lines))]
    if headings[-1] == "":
        kept.append(len(headings) - 1)
    table = [[headings[i] for i in kept], ["---"] * len(kept), *[[line[i] for i in kept] for line in lines]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)


def number(value: Any) -> str:
    """Three digits are enough to read."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _rich(title: str, headings: list[str], lines: list[list[str]], left: int) -> Any:
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < left else "right")
    for line in lines:
        made.add_row(*line)
    return made
