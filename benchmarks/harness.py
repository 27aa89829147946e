"""What every benchmark shares: variants run one by one, timed, compared, held against bars, written as JSON.

A *case* is one problem (a length, a mask), a *variant* one way to compute it, a *bar* the ratio between two variants of
a case that has to be reached. Ratios are between variants of one case in one run, never between runs. A variant that
fails (out of memory, say) is recorded with its error, and the others go on. Cases that the file holds from an earlier
run, and that this one does not measure as completely, are kept (:mod:`benchmarks.keeping`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import pathlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import keeping, measuring, ratios, tables
from benchmarks.measuring import commit, device_name, versions
from benchmarks.tables import number
from effattn.bench.clock import peak_bytes, timed

EAGER, INDUCTOR, EFFATTN = "eager", "inductor", "effattn"


@dataclass
class Row:
    """One variant of one case."""

    case: str
    variant: str
    ms: float | None = None  # median
    fastest: float | None = None
    runs: int = 0
    peak_gib: float | None = None  # largest memory during the timed runs, weights included; None on the CPU
    above_gib: float | None = None  # the same, above what was allocated before this variant (weights, inputs)
    first_s: float | None = None  # first call, compilation included
    difference: float | None = None  # largest, from the first variant of the case
    size: float | None = None  # largest absolute value of that variant
    error: str | None = None
    more: dict[str, Any] = field(default_factory=dict)  # what only this benchmark measures


@dataclass(frozen=True)
class Bar:
    """``variant`` may cost at most ``at_most`` times what the better of ``against`` costs; of none: ``at_most``."""

    case: str
    variant: str
    against: tuple[str, ...]
    at_most: float
    what: str = "ms"  # a field of Row, or a key of Row.more


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--tiny", action="store_true", help="sizes that any CPU does in seconds: a check, no measure")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--repeats", type=int, default=7, help="most timed runs of a variant (default 7)")
    made.add_argument("--seconds", type=float, help="start no further variant after this long")
    made.add_argument("--out", type=pathlib.Path, help="write the results there, as JSON; cases of earlier runs stay")
    made.add_argument("--fresh", action="store_true", help="keep nothing of what the file holds from earlier runs")
    return made


class Suite:
    """The rows and bars of one benchmark.

    Args:
        setting: what describes the problem; goes into the file.
        against: variants that every other is shown in ratio to.
    """

    def __init__(self, name: str, options: argparse.Namespace, setting: dict[str, Any], against: Sequence[str] = ()):
        self.name, self.options, self.setting, self.against = name, options, setting, tuple(against)
        self.device = torch.device(options.device)
        self.rows: list[Row] = []
        self.bars: list[Bar] = []
        self.notes: list[str] = []
        self._reference: tuple[str, Tensor] | None = None
        path: pathlib.Path | None = options.out
        self._earlier = None if path is None or options.fresh else keeping.read(path)
        if self._earlier is not None and options.tiny and not self._earlier["tiny"]:
            raise ValueError(f"{path} holds results of full sizes, which tiny ones must not replace; write elsewhere")
        self._start = time.perf_counter()
        print(f"{name} on {device_name(self.device)}", flush=True)

    # --- measuring ---

    def measure(
        self,
        case: str,
        variant: str,
        build: Callable[[], Callable[[], Any]],
        *,
        compare: Callable[[Any], Tensor] | None = lambda value: value,
        more: dict[str, Any] | None = None,
    ) -> Row | None:
        """Time one variant; None if there was no time left to start it.

        Args:
            build: makes the function to time; its own time is not counted, its memory is.
            compare: the tensor to compare, from what the first call returns; None compares nothing. The first variant
                of a case that succeeds is the reference of the others.
            more: filled by ``build`` or the function as they like, and kept.
        """
        if self.out_of_time():
            self.note(f"{keeping.LATE}{case}, {variant}")
            return None
        row = Row(case, variant, more=more if more is not None else {})
        self.rows.append(row)
        measuring.forget(self.device)
        try:
            with quiet():
                self._time(row, build, compare)
        except Exception as error:  # one that fails must not take the others with it
            row.error = _told(error)
        finally:
            measuring.forget(self.device)
        print(f"  {case} | {variant} | {_line(row)}", flush=True)
        self.save()
        return row

    def measure_in_turns(
        self,
        case: str,
        variants: dict[str, Callable[[], tuple[Callable[[], Any], Any, str | None]]],
        compare: dict[str, Callable[[Any], Tensor]],
        seconds: float = 0.5,
    ) -> None:
        """Time the variants of a case in turns, so that a device that gets hot favours none of them.

        Args:
            variants: name -> what makes the function to time, its first result, and a remark.
            compare: name -> the tensor to compare; see :meth:`measure`.
            seconds: of calls of each.
        """
        if self.out_of_time():
            for name in variants:
                self.note(f"{keeping.LATE}{case}, {name}")
            return
        functions: dict[str, Callable[[], Any]] = {}
        rows = {name: Row(case, name) for name in variants}
        measuring.forget(self.device)
        try:
            for name, make in variants.items():
                with quiet(), self._recorded(rows[name]):
                    functions[name] = self._prepared(rows[name], make, compare.get(name))
            times = dict(zip(functions, timed(list(functions.values()), self.device, seconds), strict=True))
        finally:
            functions.clear()
            measuring.forget(self.device)
        for name, timing in times.items():
            with self._recorded(rows[name]):
                if isinstance(timing, Exception):
                    raise timing
                rows[name].ms, rows[name].fastest, rows[name].runs = timing.median, timing.fastest, timing.runs
        for row in rows.values():
            self.add(row)

    @contextlib.contextmanager
    def _recorded(self, row: Row) -> Iterator[None]:
        """One that fails must not take the others with it."""
        try:
            yield
        except Exception as error:
            row.error = _told(error)

    def _prepared(self, row: Row, make: Callable[[], Any], compare: Callable[[Any], Tensor] | None) -> Any:
        self._keep_reference_of(row.case)
        before = measuring.allocated_gib(self.device)
        row.first_s, (function, value, remark) = measuring.wall_seconds(make, self.device)
        if remark is not None:
            row.more["options"] = remark
        held = self._held_gib()
        if compare is not None:
            self._compare(row, compare(value))
        del value
        used = measuring.allocated_gib(self.device) - before - (self._held_gib() - held)
        peak = peak_bytes(function, self.device)
        if peak is not None:
            row.peak_gib = row.above_gib = used + peak / measuring.GIB
        return function

    def add(self, row: Row) -> None:
        """Keep a row that was measured elsewhere, as in a process of its own."""
        self.rows.append(row)
        print(f"  {row.case} | {row.variant} | {_line(row)}", flush=True)
        self.save()

    def _time(self, row: Row, build: Callable[[], Callable[[], Any]], compare: Callable[[Any], Tensor] | None) -> None:
        self._keep_reference_of(row.case)
        before = measuring.allocated_gib(self.device) - self._held_gib()
        skipped = measuring.graphs_not_captured()
        function = build()
        row.first_s, value = measuring.wall_seconds(function, self.device)
        if compare is not None:
            self._compare(row, compare(value))
        del value
        timing = measuring.timed(function, self.device, self.options.repeats)
        row.ms, row.fastest, row.runs = timing.median, timing.fastest, timing.runs
        if (now := measuring.graphs_not_captured()) > skipped:
            row.more["graphs not captured"] = now - skipped
        if timing.peak_gib is not None:
            row.peak_gib = timing.peak_gib - self._held_gib()
            row.above_gib = row.peak_gib - before

    def _compare(self, row: Row, value: Tensor) -> None:
        if self._reference is None:
            self._reference = (row.case, value.detach().clone())
        reference = self._reference[1]
        row.size = reference.abs().max().item()
        row.difference = measuring.largest_difference(value.detach(), reference)

    def _keep_reference_of(self, case: str) -> None:
        if self._reference is not None and self._reference[0] != case:
            self._reference = None

    def _held_gib(self) -> float:
        """Memory of the reference, which is ours and not the variant's."""
        return 0.0 if self._reference is None else self._reference[1].nbytes / measuring.GIB

    def compiled(self, function: Any, backend: str, **options: Any) -> Any:
        """``function`` eager, by Inductor or by effattn, for static shapes; see :func:`compiled`."""
        return compiled(function, backend, self.options.tiny, **options)

    def out_of_time(self) -> bool:
        limit = self.options.seconds
        return limit is not None and time.perf_counter() - self._start > limit

    def note(self, text: str) -> None:
        """Something that the reader of the results has to know."""
        self.notes.append(text)
        print(f"  note: {text}", flush=True)

    # --- ratios and bars ---

    def bar(self, case: str, variant: str, against: str | Sequence[str], at_most: float, what: str = "ms") -> None:
        """Ask for ``variant`` <= ``at_most`` * the better of ``against``; only the full sizes are held against it.

        Where nothing else does the same, ``against`` is empty, and ``at_most`` is in the unit of ``what``.
        """
        names = (against,) if isinstance(against, str) else tuple(against)
        if not self.options.tiny:
            self.bars.append(Bar(case, variant, names, at_most, what))

    def reached(self) -> list[dict[str, Any]]:
        """Every bar with the ratio that this run reached (None: not measured)."""
        return ratios.reached([asdict(row) for row in self.rows], [asdict(bar) for bar in self.bars])

    # --- results ---

    def to_dict(self) -> dict[str, Any]:
        """This run alone."""
        run = {
            "date": datetime.datetime.now().isoformat(sep=" ", timespec="minutes"),
            "commit": commit(),
            "device": device_name(self.device),
            "versions": versions(),
            "seconds": time.perf_counter() - self._start,
            "setting": self.setting,
            "notes": self.notes,
        }
        rows = [{**asdict(row), "run": 0} for row in self.rows]
        return {
            "name": self.name,
            "tiny": self.options.tiny,
            "against": list(self.against),
            "runs": [run],
            "rows": rows,
            "ratios": ratios.ratios(rows, self.against),
            "bars": self.reached(),
        }

    def save(self) -> None:
        """Write what has been measured so far: a run that is cut off leaves its results."""
        path: pathlib.Path | None = self.options.out
        if path is not None:
            keeping.write(path, keeping.merge(self._earlier, self.to_dict()))

    def finish(self) -> int:
        """Write the file, show the tables. 1 if a variant failed for another reason than memory."""
        self.save()
        tables.show(self.to_dict())
        return int(any(row.error and "OutOfMemory" not in row.error for row in self.rows))


def compiled(function: Any, backend: str, tiny: bool = False, **options: Any) -> Any:
    """``function`` as it is (EAGER), compiled by Inductor (INDUCTOR) or by effattn (EFFATTN), for static shapes.

    ``options`` are torch.compile's for Inductor, the backend's for effattn, which is always strict: a benchmark of a
    fallback would mislead. ``tiny`` compiles nothing that is not attention: only to see that a benchmark runs.
    """
    if backend == EAGER:
        return function
    if backend == INDUCTOR:
        return torch.compile(function, dynamic=False, **({"backend": "eager"} if tiny else options))
    if tiny:
        options = {**options, "rest": "eager"}
    return torch.compile(function, dynamic=False, backend=_effattn(), options={"strict": True, **options})


def _effattn() -> Any:
    """The backend by its entry point; from the source tree where the package is not installed."""
    if "effattn" in torch._dynamo.list_backends(exclude_tags=()):
        return "effattn"
    from effattn.compiler.backend import effattn

    return effattn


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the advice that compilers give."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo).*")
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
        yield


def _told(error: Exception) -> str:
    """One line for the record; the place where it happened goes to the screen, in short."""
    if isinstance(error, torch.OutOfMemoryError):
        return "OutOfMemoryError: " + str(error).split(".")[0]
    print("".join(traceback.format_exception(error, limit=-3))[-1500:], file=sys.stderr, flush=True)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:400]


def _line(row: Row) -> str:
    if row.error:
        return row.error[:300]
    time_ = "" if row.ms is None else f"{row.ms:.3f} ms"
    first = "" if row.first_s is None else f", first {row.first_s:.1f} s"
    peak = f", peak {row.peak_gib:.2f} GiB (+{row.above_gib:.2f})" if row.peak_gib is not None else ""
    size = f", difference {row.difference:.2g} of {row.size:.2g}" if row.difference is not None else ""
    more = "".join(f", {key} {number(value)}" for key, value in row.more.items())
    return f"{time_}{peak}{first}{size}{more}"


def main(run: Callable[[list[str] | None], int]) -> None:
    """Run a benchmark as a program; Ctrl-C keeps what was measured."""
    try:
        sys.exit(run(None))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
