"""A roofline: operations per second over operations per byte of traffic, below the device's limits. SVG or HTML."""

from __future__ import annotations

import math
import pathlib
from functools import lru_cache
from typing import Any

import jinja2

from effattn.bench.problem import BenchError
from effattn.bench.run import Bench
from effattn.bench.show import heading
from effattn.lowering.device import device_named

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 220, 60, 60
COLOURS = ("#1b6ca8", "#d1495b", "#2f9e6e", "#e0a100", "#7a5195", "#5c6770", "#00a7b5")
KINDS = {".svg": "svg", ".html": "html"}


def draw(done: Bench, path: pathlib.Path) -> None:
    """Write the picture.

    Raises:
        BenchError: the name ends in neither .svg nor .html, or the file cannot be written.
    """
    kind = kind_of(path)
    picture = _environment().get_template("roofline.svg.jinja").render(**_parts(done))
    page = f"<!doctype html>\n<meta charset='utf-8'>\n<title>effattn bench</title>\n{picture}"
    try:
        path.write_text(page if kind == "html" else picture, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from error


def kind_of(path: pathlib.Path) -> str:
    """ "svg" or "html". Raises BenchError for other names."""
    if path.suffix not in KINDS:
        raise BenchError(f"a picture is an .svg or .html file, not {path.name!r}")
    return KINDS[path.suffix]


def _parts(done: Bench) -> dict[str, Any]:
    """Everything in pixels."""
    rates = device_named(done.about["device"])
    peak = rates.flops(done.about["setting"]["dtype"]) / 1e12
    slope = rates.bandwidth / 1e12  # TFLOP/s for one operation per byte
    points = [
        (row, work["flops"] / work["bytes"], row.tflops)
        for row in done.rows
        if row.tflops is not None and (work := done.about["work"][row.problem][row.direction])
    ]
    xs = [x for _, x, _ in points] + [peak / slope]
    ys = [y for _, _, y in points if y] + [peak]
    x_axis = _Axis(min(xs) / 2, max(xs) * 2, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(min(ys) / 2, max(ys) * 2, HEIGHT - BOTTOM, TOP)
    roof = [(x, min(peak, slope * x)) for x in (x_axis.low, peak / slope, x_axis.high)]
    peers = list(dict.fromkeys(row.peer for row, _, _ in points))
    colours = {peer: COLOURS[i % len(COLOURS)] for i, peer in enumerate(peers)}
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "box": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        "heading": heading(done),
        "roof": [(x_axis.at(x), y_axis.at(y)) for x, y in roof if y >= y_axis.low],
        "limit": f"{peak:.3g} TFLOP/s, {rates.bandwidth / 1e12:.2g} TB/s ({rates.name}, {rates.source})",
        "x_ticks": [(x_axis.at(value), f"{value:g}") for value in x_axis.ticks()],
        "y_ticks": [(y_axis.at(value), f"{value:g}") for value in y_axis.ticks()],
        "points": [
            {
                "x": x_axis.at(x),
                "y": y_axis.at(y),
                "colour": colours[row.peer],
                "hollow": row.direction == "backward",
                "title": f"{row.peer}, {row.problem}, {row.direction}: {row.ms:.3g} ms, {y:.3g} TFLOP/s",
            }
            for row, x, y in points
            if y
        ],
        "legend": [(HEIGHT - BOTTOM - 20 * (len(peers) - i), peer, colours[peer]) for i, peer in enumerate(peers)],
    }


class _Axis:
    """A logarithmic axis from ``low`` to ``high``, between two pixels."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        found = [10.0**power for power in range(first, last + 1)]
        if len([value for value in found if self.low <= value <= self.high]) < 3:
            found = [factor * value for value in found for factor in (1, 2, 5)]
        return [value for value in found if self.low <= value <= self.high]


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
