"""Layer ranges as users write them: ``"0-3, 8, 20-"``, ``[0, 1, 2, 3, 8]``, or ``"0-1 of every 7"``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

LARGEST = 100_000  # more layers than any model has; catches typing errors
_PART = re.compile(r"(\d{1,9})\s*(?:(-)\s*(\d{1,9})?)?", re.ASCII)
_PERIOD = re.compile(r"(.*?)\s+of\s+every\s+(\d{1,6})", re.ASCII)
ALLOWED = 'a string such as "0", "0-3, 8, 20-", "0-1 of every 7", or a list of layer numbers'


@dataclass(frozen=True)
class Layers:
    """Sorted, disjoint ranges ``(first, last)``; the last one may be open (``last`` None).

    With a ``period``, the ranges repeat every ``period`` layers, for as many layers as the model has.
    """

    ranges: tuple[tuple[int, int | None], ...]
    period: int | None = None

    def __contains__(self, layer: int) -> bool:
        layer = layer if self.period is None else layer % self.period
        return any(first <= layer and (last is None or layer <= last) for first, last in self.ranges)

    def beyond(self, count: int) -> str | None:
        """Which layers are named but missing in a model of ``count`` layers, as text; None if none are."""
        for first, last in self.ranges if self.period is None else ():
            if first >= count or (last is not None and last >= count):
                has = f"the model has {count} layers, 0 to {count - 1}" if count else "the model has no layers"
                what = "is" if first == last else "starts" if first >= count else "ends"
                return f"{_spelled(first, last)} {what} after the last layer: {has}" if count else has
        return None

    def __str__(self) -> str:
        text = ", ".join(_spelled(first, last) for first, last in self.ranges)
        return text if self.period is None else f"{text} of every {self.period}"


def _spelled(first: int, last: int | None) -> str:
    return f"{first}-" if last is None else f"{first}" if first == last else f"{first}-{last}"


@lru_cache(maxsize=1024)
def parse(text: str) -> Layers:
    """Parse a layer range.

    Raises:
        ValueError: not a range; the message names the part and the reason.
    """
    if periodic := _PERIOD.fullmatch(text.strip()):
        within, period = parse(periodic[1]), int(periodic[2])
        last = within.ranges[-1][1]
        if within.period is not None or last is None or last >= period:
            raise ValueError(f"{text!r}: layers of every {period} are counted from 0 to {period - 1}")
        return Layers(within.ranges, period)
    ranges: list[tuple[int, int | None]] = []
    for part in text.split(","):
        found = _PART.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"{part.strip()!r} in {text!r} is not a layer or a range of layers; expected {ALLOWED}")
        first = int(found[1])
        last = first if found[2] is None else int(found[3]) if found[3] else None
        if last is not None and last < first:
            raise ValueError(f"the range {part.strip()!r} runs backwards; expected {last}-{first}")
        if max(first, last or 0) > LARGEST:
            raise ValueError(f"{part.strip()!r} names a layer beyond {LARGEST}")
        ranges.append((first, last))
    return Layers(_merged(ranges))


def read(value: object) -> Layers:
    """Layers from a policy value: a string, an int, or a list of ints.

    Raises:
        ValueError: the value is invalid.
    """
    if isinstance(value, Layers):
        return value
    if isinstance(value, str):
        return parse(value)
    numbers: list = list(value) if isinstance(value, (list, tuple)) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"expected {ALLOWED}; got {value!r}")
        if not 0 <= number <= LARGEST:
            raise ValueError(f"layers are counted from 0; got {number}")
    if not numbers:
        raise ValueError(f"names no layer; expected {ALLOWED}, or leave the key out to mean all layers")
    return Layers(_merged([(number, number) for number in numbers]))


def _merged(ranges: list[tuple[int, int | None]]) -> tuple[tuple[int, int | None], ...]:
    merged: list[tuple[int, int | None]] = []
    for first, last in sorted(ranges, key=lambda pair: pair[0]):
        if merged and (merged[-1][1] is None or first <= merged[-1][1] + 1):
            before, end = merged[-1]
            merged[-1] = (before, None if end is None or last is None else max(end, last))
        else:
            merged.append((first, last))
    return tuple(merged)
