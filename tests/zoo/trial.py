"""One architecture in one setting: compiled with the backend, held against itself, its attentions counted."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from building import NotBuilt, with_arguments
from inputs import padded
from torch.utils._pytree import tree_leaves
from watching import watched

from effattn.compiler import collect
from effattn.compiler.backend import effattn

ATTENTIONS = ("sdpa", "eager")
SETTINGS = ("whole", "left", "right")
TOLERANCE = 1e-4  # of the largest value; float32


@dataclass
class Trial:
    """What came of it. Counts are of attentions that ran, not of graphs."""

    name: str
    attention: str
    setting: str
    model: str = ""
    sites: int = 0  # counted in an eager run
    found: int = 0  # of those, how many the backend rewrote
    refused: int = 0
    others: int = 0  # softmaxes that the backend says are no attention: routers, kernels of a convolution
    reasons: list[str] = field(default_factory=list)
    predicates: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    difference: float | None = None  # over the largest value
    sensitivity: float = 0.0  # of the model itself, where the difference is large: to weights rounded otherwise
    not_run: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """ "right", or what is wrong."""
        if self.not_run or self.error:
            return "not run" if self.not_run else "error"
        if self.difference is None or not self.difference <= max(TOLERANCE, 2 * self.sensitivity):
            return "differs"
        if self.found + self.refused + self.others < self.sites:
            return "unseen"
        return "right" if not self.refused else "refused"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def run(name: str, attention: str, setting: str) -> Trial:
    """Try an architecture; whatever fails is in the record."""
    trial, start = Trial(name, attention, setting), time.perf_counter()
    try:
        _run(trial)
    except NotBuilt as error:
        trial.not_run = str(error)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        trial.error = f"{type(error).__name__}: {lines[0][:300]}"
    trial.seconds = round(time.perf_counter() - start, 2)
    return trial


def _run(trial: Trial) -> None:
    model, given = with_arguments(trial.name, trial.attention)
    trial.model = type(model).__name__
    if trial.setting != "whole":
        masked = padded(given, trial.setting)
        if masked is None:
            raise NotBuilt("it has no tokens that could be padding")
        given = masked
    try:
        expected, seen = watched(model, given)
    except Exception as error:
        raise NotBuilt(f"eager: {type(error).__name__}: {str(error)[:200]}") from error
    trial.sites = seen.sites
    executed = Executed()
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        compiled = torch.compile(model, backend=executed.backend)
        actual = compiled(**given)
    executed.fill(trial)
    trial.difference = largest_difference(actual, expected)
    if not trial.difference <= TOLERANCE:
        trial.sensitivity = sensitivity(model, given, expected)


def sensitivity(model: torch.nn.Module, given: dict[str, Any], expected: Any) -> float:
    """How far the outputs move when every weight changes by its last digit: some random models amplify rounding."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.mul_(1 + 2**-22 * (torch.rand(weight.shape, generator=generator) - 0.5))
        return largest_difference(model(**given), expected)


class Executed:
    """A backend that counts how often each of its graphs runs: layers may share one."""

    def __init__(self) -> None:
        self.reports: list[Any] = []
        self.runs: Counter[int] = Counter()

    def backend(self, gm: Any, example_inputs: Any) -> Any:
        with collect.listening() as heard:
            function = effattn(gm, example_inputs, options={"rest": "eager", "strict": True})
        number = len(self.reports)
        self.reports.append(heard.graphs)

        def counted(*args: Any) -> Any:
            self.runs[number] += 1
            return function(*args)

        return counted

    def fill(self, trial: Trial) -> None:
        predicates: Counter[str] = Counter()
        forms: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for number, graphs in enumerate(self.reports):
            times = self.runs[number]
            for graph in graphs:
                for site in graph.sites:
                    predicates[site.predicate] += times
                    forms[site.form] += times
                for missed in graph.missed:
                    if missed.attention:
                        reasons[missed.reason] += times
                    else:
                        trial.others += times
        trial.graphs = len(self.reports)
        trial.found, trial.refused = predicates.total(), reasons.total()
        trial.predicates, trial.forms = dict(predicates), dict(forms)
        trial.reasons = [f"{times} x {reason}" for reason, times in reasons.items() if times]


def largest_difference(actual: Any, expected: Any) -> float:
    """The largest absolute difference of two results, over the largest value; infinite if they do not match."""
    worst, size = 0.0, 0.0
    ours, theirs = (
        [leaf for leaf in tree_leaves(dict(one) if hasattr(one, "keys") else one) if isinstance(leaf, torch.Tensor)]
        for one in (actual, expected)
    )
    if len(ours) != len(theirs):
        return float("inf")
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        if not other.is_floating_point():
            continue
        apart = torch.where(one.isnan() & other.isnan() | (one == other), 0.0, (one - other).abs().double())
        worst = max(worst, apart.nan_to_num(nan=torch.inf).max().item() if apart.numel() else 0.0)
        finite = other[other.isfinite()]
        size = max(size, finite.abs().max().item() if finite.numel() else 0.0)
    return worst / max(size, 1e-30) if worst else 0.0
