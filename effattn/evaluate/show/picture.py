"""A picture: error and lost mass by layer and policy, passkeys by length and depth. Needs matplotlib."""

from __future__ import annotations

import pathlib
from typing import Any

from effattn.evaluate.results import Results
from effattn.evaluate.setting import DENSE
from effattn.evaluate.show.tables import heading, passkeys_of

INSTALL = 'pip install "effattn[evaluate]"'
NEGLIGIBLE = 1e-4  # smaller errors are rounding and are drawn as 0
LABELS = 32  # most layers whose cells show values


def draw(done: Results, path: pathlib.Path) -> str | None:
    """Write the picture. Returns None, or the reason why there is none."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"no picture: matplotlib is not installed ({INSTALL})"
    rows = _rows(done)
    if not rows:
        return "no picture: neither errors by layer nor passkeys were measured"
    heights = [row.height for row in rows]
    figure = Figure(figsize=(13, sum(heights) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_wrapped(heading(done)), fontsize=8, color="0.35", x=0.01, ha="left")
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        row.draw(part)
    figure.savefig(path, dpi=130, format="png")
    return None


def _rows(done: Results) -> list[Any]:
    rows: list[Any] = []
    for length in done.lengths:
        if any(site.length == length for site in done.sites):
            rows += [LayerMap(done, length, "error"), LayerMap(done, length, "lost")]
    if done.passkeys:
        rows.append(PasskeyMaps(done))
    return rows


class LayerMap:
    """Policies x layers at one length: relative error of the output, or softmax mass outside the kept keys."""

    def __init__(self, done: Results, length: int, what: str):
        self.what, self.length = what, length
        self.sites = [site for site in done.sites if site.length == length]
        values = {
            policy: [self._value(next(form for form in site.forms if form.policy == policy)) for site in self.sites]
            for policy in done.policies
        }
        shown = {policy: line for policy, line in values.items() if any(line)} or values  # omit policies without errors
        self.policies, self.values = list(shown), list(shown.values())
        self.height = 0.9 + 0.36 * len(self.policies)

    def _value(self, form: Any) -> float:
        value = (form.error if form.error is not None else 1.0) if self.what == "error" else 1.0 - form.mass
        return value if value > NEGLIGIBLE else 0.0

    def draw(self, figure: Any) -> None:
        axes = figure.subplots()
        title = "relative error of the output" if self.what == "error" else "softmax mass that is not on kept keys"
        top = max(max(map(max, self.values)), 1e-3)
        image = axes.imshow(self.values, aspect="auto", cmap="magma_r", vmin=0, vmax=top)
        layers = [site.number if site.layer is None else site.layer for site in self.sites]
        step = max(1, len(layers) // LABELS)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
        axes.set_yticks(range(len(self.policies)), self.policies, fontsize=8)
        axes.set_title(f"{self.length:,} tokens: {title}, by layer", fontsize=9, loc="left")
        axes.tick_params(length=0)
        if len(layers) <= LABELS:
            for y, line in enumerate(self.values):
                for x, value in enumerate(line):
                    _write(axes, x, y, _short(value), value / top > 0.6, 6)
        figure.colorbar(image, ax=axes, pad=0.01, aspect=12).ax.tick_params(labelsize=7)


class PasskeyMaps:
    """Depths x lengths, one map per policy: keys found out of keys hidden."""

    def __init__(self, done: Results):
        self.done = done
        self.policies = [DENSE, *done.policies]
        self.depths = sorted({answer.depth for answer in done.passkeys})
        self.lengths = [n for n in done.lengths if any(answer.length == n for answer in done.passkeys)]
        self.height = 1.2 + 0.4 * len(self.depths)

    def draw(self, figure: Any) -> None:
        figure.suptitle("passkeys found, by length (across) and depth of the key (down)", fontsize=9, x=0.01, ha="left")
        all_axes = figure.subplots(1, len(self.policies), squeeze=False)[0]
        for number, (axes, policy) in enumerate(zip(all_axes, self.policies, strict=True)):
            cells = [[passkeys_of(self.done, n, policy, depth) for n in self.lengths] for depth in self.depths]
            shares = [[found / asked if asked else 0.0 for found, asked in line] for line in cells]
            axes.imshow(shares, aspect="auto", cmap="YlGn", vmin=0, vmax=1)
            axes.set_title(policy, fontsize=8)
            axes.set_xticks(range(len(self.lengths)), [_tokens(n) for n in self.lengths], fontsize=7)
            axes.set_yticks(range(len(self.depths)), [f"{d:g}" for d in self.depths] if not number else [], fontsize=7)
            axes.tick_params(length=0)
            for y, line in enumerate(cells):
                for x, (found, asked) in enumerate(line):
                    _write(axes, x, y, f"{found}/{asked}" if asked else "", shares[y][x] > 0.7, 7)


def _write(axes: Any, x: int, y: int, text: str, on_dark: bool, size: int) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if on_dark else "black")


def _short(value: float) -> str:
    return "" if value == 0 else f"{value:.2f}".removeprefix("0") if value < 9.95 else ">9"


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"


def _wrapped(text: str, width: int = 190) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
