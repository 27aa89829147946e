"""Runs a list of passes on one graph, in order. Each is timed; the graph changes as a whole or not at all.

A failure at one attention affects only that attention (:func:`effattn.passes.candidate.failures.left_alone`). If an
optional pass fails, the others run again without it; if another pass fails, the graph is left unchanged.
"""

from __future__ import annotations

import copy
import difflib
import time
from collections.abc import Sequence
from typing import Any

from torch import fx

from effattn.errors import OptionError
from effattn.passes.candidate.failures import refusal_of
from effattn.passes.candidate.record import Missed
from effattn.passes.compilation import Compilation, MakesPass, Outcome, Pass, PassRecord, RunWithout
from effattn.passes.rewrite.check import check

SOURCE = "_dynamo_source"


def run(passes: Sequence[MakesPass], work: Compilation, *, differences: bool = False) -> Outcome:
    """Run ``passes`` on ``work.gm`` in place, then undo, last pass first, what no site used.

    If no site was replaced, the graph is the same as before.

    Args:
        differences: record how each pass changed the graph's code.

    Raises:
        The exception of a pass that is not optional; of any pass with ``strict``. The graph is then as before.
    """
    left_out: dict[type[Pass], Missed | None] = {}
    while True:
        original = _copy(work.graph)
        work.outcome, work.taken = Outcome(original=original), set()
        work.forget_view()
        chosen = [one for one in (make() for make in passes) if type(one) not in left_out]
        try:
            _run_all(chosen, work, original, differences)
        except RunWithout as found:
            work.gm.graph = original
            left_out[found.unwanted] = None
            continue
        except _Failed as failed:
            work.gm.graph = original
            error = failed.error
            done_without = isinstance(error, Exception) and not isinstance(error, OptionError)
            if work.strict or not failed.culprit.optional or not done_without:
                raise error from None
            left_out[type(failed.culprit)] = Missed(failed.culprit.name, "", refusal_of(error))
            continue
        except BaseException:
            work.gm.graph = original
            raise
        work.outcome.missed += [missed for missed in left_out.values() if missed is not None]
        return work.outcome


class _Failed(Exception):
    """A pass raised ``error``."""

    def __init__(self, culprit: Pass, error: Any):
        super().__init__(culprit.name)
        self.culprit, self.error = culprit, error


def _run_all(passes: list[Pass], work: Compilation, original: fx.Graph, differences: bool) -> None:
    for number, one in enumerate(passes):
        missing = set(one.needs) - {before.fills for before in passes[:number]}
        assert not missing, f"{one.name} needs {', '.join(sorted(missing))} before it"
        _timed(one, one.name, one.apply, work, differences)
    for one in reversed(passes):
        if type(one).undo is not Pass.undo:
            _timed(one, f"undo: {one.name}", one.undo, work, differences)
    if work.taken:
        check(work.graph, original)
    else:
        work.gm.graph = original
        work.outcome.original = _copy(original) if work.keep_canonical else None
    work.gm.recompile()


def _timed(one: Pass, name: str, step, work: Compilation, differences: bool) -> None:
    count, start = len(work.graph.nodes), time.perf_counter()
    before = _code(work.graph) if differences else ""
    try:
        changed = step(work)
    except RunWithout:
        raise
    except BaseException as error:
        raise _Failed(one, error) from error
    if changed:
        work.forget_view()
    text = ""
    if differences:
        lines = difflib.unified_diff(before.splitlines(), _code(work.graph).splitlines(), "before", "after", n=1)
        text = "\n".join(line.rstrip() for line in lines)
    record = PassRecord(name, time.perf_counter() - start, changed, (count, len(work.graph.nodes)), text)
    work.outcome.passes.append(record)


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy that can replace the graph: it keeps Dynamo's source of each input, which Inductor reads."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.find_nodes(op="placeholder"), copied.find_nodes(op="placeholder"), strict=True):
        if hasattr(old, SOURCE):
            setattr(new, SOURCE, getattr(old, SOURCE))
    return copied
