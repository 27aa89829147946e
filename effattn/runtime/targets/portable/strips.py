"""A call as strips: consecutive chunks of queries whose runs of keys have equal widths and lie at equal distances.

All chunks of a strip are computed together. Their keys overlap in memory, so most of them are read as one view. Where
each chunk sees all keys that the one before it sees, and its own causally, they are one large chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from effattn.runtime.targets.chunks import Chunk, Run, union

ALONE = 256  # keys without a mask that are worth a call of their own


@dataclass(frozen=True)
class Keys:
    """A run of keys of each chunk: ``width`` keys from ``first`` on, ``step`` later in each next chunk."""

    first: int
    width: int
    full: bool  # every query keeps all of them
    step: int = 0
    causal: bool = False  # the first query keeps the first key, the next one more, and so on

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
    def diagonal(self) -> Keys | None:
        """The keys that are kept causally."""
        return next((keys for keys in self.keys if keys.causal), None)

    @property
    def tested(self) -> tuple[Keys, ...]:
        """The runs with a mask."""
        return tuple(keys for keys in self.keys if not keys.full and not keys.causal)

    @property
    def width_tested(self) -> int:
        return sum(keys.width for keys in self.tested)


def strips(chunks: Iterable[Chunk | Strip], most: Callable[[Chunk], int]) -> Iterator[Strip]:
    """Chunks, in order, as strips; ``most`` says of how many chunks like a given one these may consist."""
    open_strip: Strip | None = None
    for chunk in chunks:
        longer = None
        if open_strip is not None and isinstance(chunk, Chunk) and open_strip.chunks < most(chunk):
            longer = _with(open_strip, chunk)
        if open_strip is not None and longer is None:
            yield open_strip
        open_strip = longer or (alone(chunk) if isinstance(chunk, Chunk) else chunk)
    if open_strip is not None:
        yield open_strip


def alone(chunk: Chunk) -> Strip:
    """A strip of one chunk."""
    keys = tuple(Keys(run.start, run.stop - run.start, run.full) for run in chunk.runs)
    return Strip(chunk.start, chunk.stop - chunk.start, 1, keys)


def causal(chunks: Iterable[Chunk], is_diagonal: Callable[[Strip], bool]) -> Iterator[Chunk | Strip]:
    """The same queries, with consecutive chunks as one where each only sees more keys causally than the one before.

    ``is_diagonal`` says whether the keys that a chunk tests are kept causally.
    """
    waiting: list[Chunk] = []
    for given in chunks:
        chunk = _with_square(given)
        diagonal = _square(chunk) is not None and is_diagonal(alone(chunk))
        if waiting and not (diagonal and _continues(waiting[-1], chunk)):
            yield from _as_one(waiting)
            waiting = []
        if diagonal:
            waiting.append(chunk)
        else:
            yield given
    yield from _as_one(waiting)


def joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Runs in order, those that touch and are of a kind as one."""
    found: list[Run] = []
    for run in sorted(runs, key=lambda run: run.start):
        if found and found[-1].stop == run.start and found[-1].full == run.full:
            run = replace(found.pop(), stop=run.stop)
        found.append(run)
    return tuple(found)


def _with_square(chunk: Chunk) -> Chunk:
    """The chunk with the key that all see among those that are tested, if these begin behind the first query's own."""
    tested = [run for run in chunk.runs if not run.full]
    before = [run for run in chunk.runs if run.full and tested and run.stop == tested[0].start]
    if len(tested) != 1 or not before or tested[0].stop - tested[0].start != chunk.stop - chunk.start - 1:
        return chunk
    shorter = Run(before[0].start, before[0].stop - 1, True)
    others = [run for run in chunk.runs if run not in (before[0], tested[0])]
    runs = [*others, Run(shorter.stop, tested[0].stop, False)] + ([shorter] if shorter.start < shorter.stop else [])
    return Chunk(chunk.start, chunk.stop, tuple(sorted(runs, key=lambda run: run.start)))


def _square(chunk: Chunk) -> Run | None:
    """The one run that a chunk tests, if it has as many keys as the chunk has queries."""
    tested = [run for run in chunk.runs if not run.full]
    return tested[0] if len(tested) == 1 and tested[0].stop - tested[0].start == chunk.stop - chunk.start else None


def _continues(chunk: Chunk, other: Chunk) -> bool:
    """Whether all queries of ``other`` see the keys that some query of ``chunk`` sees, and the next keys causally."""
    before, after = _square(chunk), _square(other)
    shared = union([(run.start, run.stop) for run in other.runs if run.full])
    return before is not None and after is not None and before.stop == after.start and chunk.slices() == shared


def _as_one(chunks: list[Chunk]) -> Iterator[Chunk | Strip]:
    if len(chunks) < 2:
        yield from chunks
        return
    first = alone(chunks[0])
    rows = chunks[-1].stop - first.start
    free = tuple(keys for keys in first.keys if keys.full)
    (tested,) = first.tested
    yield Strip(first.start, rows, 1, (*free, Keys(tested.first, rows, False, causal=True)))


def _with(strip: Strip, chunk: Chunk) -> Strip | None:
    """The strip and one more chunk; None if the chunk does not continue it."""
    if chunk.stop - chunk.start != strip.rows or len(chunk.runs) != len(strip.keys) or strip.diagonal is not None:
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
