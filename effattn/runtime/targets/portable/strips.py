"""A call as strips: consecutive chunks of queries whose runs of keys have equal widths and lie at equal distances.

All chunks of a strip are computed together. Their keys overlap in memory, so most of them are read as one view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from effattn.runtime.targets.chunks import Chunk, Run

ALONE = 256  # keys without a mask that are worth a call of their own


@dataclass(frozen=True)
class Keys:
    """A run of keys of each chunk: ``width`` keys from ``first`` on, ``step`` later in each next chunk."""

    first: int
    width: int
    full: bool  # every query keeps all of them
    step: int = 0

    def of(self, chunk: int) -> tuple[int, int]:
        """(start, stop) of one chunk."""
        start = self.first + chunk * self.step
        return start, start + self.width


@dataclass(frozen=True)
class Strip:
    """``chunks`` times ``rows`` queries from ``start`` on, and the keys of each chunk."""

    start: int
    rows: int
    chunks: int
    keys: tuple[Keys, ...]

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.chunks

    @property
    def main(self) -> Keys | None:
        """The longest run without a mask, if it is worth a call of its own."""
        longest = max((keys for keys in self.keys if keys.full), key=lambda keys: keys.width, default=None)
        return longest if longest is not None and longest.width >= ALONE else None

    @property
    def free(self) -> tuple[Keys, ...]:
        """The other runs without a mask."""
        main = self.main
        return tuple(keys for keys in self.keys if keys.full and keys is not main)

    @property
    def tested(self) -> tuple[Keys, ...]:
        """The runs with a mask."""
        return tuple(keys for keys in self.keys if not keys.full)

    @property
    def width_tested(self) -> int:
        return sum(keys.width for keys in self.tested)


def strips(chunks: Iterable[Chunk], most: Callable[[Chunk], int]) -> Iterator[Strip]:
    """Chunks, in order, as strips; ``most`` says of how many chunks like a given one these may consist."""
    open_strip: Strip | None = None
    for chunk in chunks:
        longer = None if open_strip is None or open_strip.chunks >= most(chunk) else _with(open_strip, chunk)
        if open_strip is not None and longer is None:
            yield open_strip
        keys = tuple(Keys(run.start, run.stop - run.start, run.full) for run in chunk.runs)
        open_strip = longer or Strip(chunk.start, chunk.stop - chunk.start, 1, keys)
    if open_strip is not None:
        yield open_strip


def _with(strip: Strip, chunk: Chunk) -> Strip | None:
    """The strip and one more chunk; None if the chunk does not continue it."""
    if chunk.stop - chunk.start != strip.rows or len(chunk.runs) != len(strip.keys):
        return None
    keys = [_continued(keys, run, strip.chunks) for keys, run in zip(strip.keys, chunk.runs, strict=True)]
    found = tuple(one for one in keys if one is not None)
    return replace(strip, chunks=strip.chunks + 1, keys=found) if len(found) == len(keys) else None


def _continued(keys: Keys, run: Run, chunks: int) -> Keys | None:
    if run.full != keys.full or run.stop - run.start != keys.width:
        return None
    step = run.start - keys.first if chunks == 1 else keys.step
    continues = step >= 0 and run.start == keys.first + chunks * step
    return replace(keys, step=step) if continues else None
