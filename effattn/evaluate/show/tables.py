"""Tables of an evaluation: for a terminal, as text, as Markdown."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from effattn.evaluate.records import FormAtSite
from effattn.evaluate.results import Results
from effattn.evaluate.setting import DENSE

WORST = 3  # number of layers that are named


@dataclass(frozen=True)
class Table:
    """Headings and lines of text; all but the first columns are numbers."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    words: int = 2  # number of leading text columns

    def without_empty_columns(self) -> Table:
        kept = [i for i in range(len(self.headings)) if i < self.words or any(line[i] for line in self.lines)]
        lines = tuple(tuple(line[i] for i in kept) for line in self.lines)
        return Table(self.title, tuple(self.headings[i] for i in kept), lines, self.words)

    def markdown(self) -> str:
        rule = ["---" if i < self.words else "---:" for i in range(len(self.headings))]
        rows = [self.headings, tuple(rule), *self.lines]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tables(done: Results) -> list[Table]:
    """All tables that have results."""
    made = [whole_model(done), attention(done), by_layer(done), passkeys(done)]
    return [table.without_empty_columns() for table in made if table.lines]


def whole_model(done: Results) -> Table:
    """Costs and savings of each policy, the dense model first."""
    headings = ("tokens", "policy", "density", "perplexity", "to dense", "passkeys", "prefill, s", "over dense")
    lines = []
    for length in done.lengths:
        for policy in (DENSE, *done.policies):
            loss, dense = loss_of(done, length, policy), loss_of(done, length, DENSE)
            time, dense_time = time_of(done, length, policy), time_of(done, length, DENSE)
            found = [answer.found for answer in done.passkeys if (answer.length, answer.policy) == (length, policy)]
            if loss is None and time is None and not found:
                continue
            figures = (
                _number(density_of(done, length, policy), ".3f"),
                _number(None if loss is None else math.exp(loss), ".3f"),
                "" if loss is None or dense is None or policy == DENSE else f"{math.expm1(loss - dense):+.2%}",
                f"{sum(found)} of {len(found)}" if found else "",
                _number(time, ".2f"),
                "" if time is None or dense_time is None or policy == DENSE else f"{time / dense_time:.2f}",
            )
            lines.append((f"{length:,}", policy, *figures))
    return Table("Policies against the dense model", headings, tuple(lines))


def attention(done: Results) -> Table:
    """Means over the attentions of the model."""
    headings = ("tokens", "policy", "density", "error", "mass", "oracle's mass", "at density")
    lines = []
    for length in done.lengths:
        for policy in done.policies:
            forms = forms_of(done, length, policy)
            if not forms:
                continue
            figures = (
                _number(_mean([form.density for form in forms]), ".3f"),
                _error(_mean([form.error for form in forms if form.error is not None])),
                _number(_mean([form.mass for form in forms]), ".4f"),
                _number(_mean([form.oracle_mass for form in forms]), ".4f"),
                _number(_mean([form.oracle_density for form in forms]), ".3f"),
            )
            lines.append((f"{length:,}", policy, *figures))
    return Table("Attention, mean over the layers", headings, tuple(lines))


def by_layer(done: Results) -> Table:
    """The layers with the largest errors and the least mass."""
    headings = ("tokens", "policy", "layer: largest errors", "layer: least mass")
    lines = []
    for length in done.lengths:
        for policy in done.policies:
            layers = [
                (str(site.number if site.layer is None else site.layer), form)
                for site in done.sites
                for form in site.forms
                if (site.length, form.policy) == (length, policy) and form.density < 1
            ]
            if not layers:
                continue
            worst = sorted(layers, key=lambda item: -(item[1].error or 0.0))[:WORST]
            least = sorted(layers, key=lambda item: item[1].mass)[:WORST]
            errors = ", ".join(f"{layer}: {_error(form.error)}" for layer, form in worst)
            lines.append(
                (f"{length:,}", policy, errors, ", ".join(f"{layer}: {form.mass:.3f}" for layer, form in least))
            )
    return Table("Layers", headings, tuple(lines), words=4)


def passkeys(done: Results) -> Table:
    """Keys found, by length and depth."""
    depths = sorted({answer.depth for answer in done.passkeys})
    lines = []
    for length in done.lengths if depths else ():
        for policy in (DENSE, *done.policies):
            cells = [passkeys_of(done, length, policy, depth) for depth in depths]
            lines.append((f"{length:,}", policy, *[f"{found} of {all_}" if all_ else "" for found, all_ in cells]))
    return Table("Passkeys found, by depth", ("tokens", "policy", *[f"{depth:g}" for depth in depths]), tuple(lines))


def forms_of(done: Results, length: int, policy: str) -> list[FormAtSite]:
    return [form for site in done.sites if site.length == length for form in site.forms if form.policy == policy]


def density_of(done: Results, length: int, policy: str) -> float | None:
    """The measured density, mean over the attentions; if not measured, the computed one."""
    if policy == DENSE:
        return 1.0
    measured = _mean([form.density for form in forms_of(done, length, policy)])
    known = [item.density for item in done.densities if (item.length, item.policy) == (length, policy)]
    return measured if measured is not None else _mean(known)


def loss_of(done: Results, length: int, policy: str) -> float | None:
    return _mean([item.loss for item in done.losses if (item.length, item.policy) == (length, policy)])


def time_of(done: Results, length: int, policy: str) -> float | None:
    for item in done.times:
        if (item.length, item.policy) == (length, policy):
            return median(item.later) if item.later else item.first
    return None


def passkeys_of(done: Results, length: int, policy: str, depth: float) -> tuple[int, int]:
    """(found, asked)."""
    asked = [item for item in done.passkeys if (item.length, item.policy, item.depth) == (length, policy, depth)]
    return sum(item.found for item in asked), len(asked)


def heading(done: Results) -> str:
    """One line: model, text, device, versions and date."""
    about = done.about
    model, packages = about["model"], ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    rope = f", positions scaled by {about['rope_scaling']}" if about["rope_scaling"] else ""
    return (
        f"{model['name']} ({model['parameters'] / 1e6:,.0f} million parameters, {model['dtype']}){rope}; text: "
        f"{about['text']['source']}; {about['device']}; {packages}; {about['date']}"
    )


def rich_tables(done: Results) -> list[Any]:
    """The tables for a rich console."""
    from rich.table import Table as RichTable

    made = []
    for table in tables(done):
        shown = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, name in enumerate(table.headings):
            shown.add_column(name, justify="left" if number < table.words else "right")
        for line in table.lines:
            shown.add_row(*line, style="dim" if line[1] == DENSE else None)
        made.append(shown)
    return made


def plain(done: Results, width: int = 160) -> str:
    """All tables as text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(heading(done), markup=False)
    for table in rich_tables(done):
        console.print()
        console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip()


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if value < 5e-4 else f"{value:.3f}"
