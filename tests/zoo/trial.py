"""One architecture in one setting: compiled with the backend, held against itself, its attentions counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from building import Built, NotBuilt, build, with_attention
from inductor_count import replaced_by_inductor
from results import EVERY
from settings import SETTINGS, Call
from torch.utils._pytree import tree_leaves
from watching import softmaxes_of, watching

from effattn.compiler.backend import effattn
from effattn.compiler.report import collect

FLEX = "flex_attention"
ATTENTIONS = ("eager", "sdpa", FLEX)
TOLERANCE = 1e-4  # of the largest value; float32
LEFT_OUT = "torch.compile ran it outside of every graph, after a graph break"
MOST_COMPILATIONS = 64  # of one forward: beyond, Dynamo would run it as it is, without a word


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
    inductor: int | None = None  # how many Inductor's own patterns replace in the same graphs
    reasons: list[str] = field(default_factory=list)
    predicates: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    difference: float | None = None  # over the largest value
    of_graphs: float | None = None  # the same to the graphs as Dynamo made them, where the difference is large
    sensitivity: float = 0.0  # of the model itself, where the difference is large: to weights rounded otherwise
    not_run: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """ "right", or what is wrong."""
        if self.not_run or self.error:
            return "not run" if self.not_run else "error"
        # a shape or whole number that differs is no matter of rounding: then the difference is infinite
        apart = self.difference if self.of_graphs is None else self.of_graphs
        if apart is None or not apart <= max(TOLERANCE, 2 * self.sensitivity) < float("inf"):
            return "differs"
        if self.told < self.sites:
            return "unseen"
        return "right" if not self.refused else "refused"

    @property
    def found_softmaxes(self) -> int:
        """Without linear attention, which has no softmax and was not counted among the sites."""
        return self.found - self.forms.get("linear", 0)

    @property
    def told(self) -> int:
        """Of how many softmaxes the backend said something."""
        return self.found_softmaxes + self.refused + self.others

    def to_dict(self) -> dict[str, Any]:
        """Without what is empty, so that a file of many stays small."""
        plain = asdict(Trial("", "", ""))
        told = {name: value for name, value in asdict(self).items() if value != plain[name]}
        return {**told, "verdict": self.verdict}

    @staticmethod
    def of(row: dict[str, Any]) -> Trial:
        """The inverse of :meth:`to_dict`."""
        return Trial(**{name: value for name, value in row.items() if name != "verdict"})


def trials(name: str, attention: str, settings: list[str]) -> Iterator[Trial]:
    """Try an architecture in some settings; one trial of the setting :data:`EVERY` where it cannot be built."""
    try:
        # FlexAttention cannot be watched: its attentions are those of the same model with eager attention
        seen = build(name, "eager" if attention == FLEX else attention)
        built = with_attention(seen, attention) if attention == FLEX else seen
    except NotBuilt as error:
        yield Trial(name, attention, EVERY, not_run=str(error))
        return
    for setting in settings:
        yield run(built, seen, setting)


def run(built: Built, seen: Built, setting: str) -> Trial:
    """Try a model in one setting; attentions are counted in ``seen``. Whatever fails is in the record."""
    trial, start = Trial(built.name, built.attention or "", setting), time.perf_counter()
    try:
        _run(trial, built, seen)
    except NotBuilt as error:
        trial.not_run = str(error)
    except Exception as error:
        trial.error = _told(error)
    trial.seconds = round(time.perf_counter() - start, 2)
    return trial


def _run(trial: Trial, built: Built, seen: Built) -> None:
    trial.model = type(built.model).__name__
    prepare = SETTINGS[trial.setting].prepare
    call = prepare(built)
    expected, trial.sites = _uncompiled(call if seen is built else prepare(seen))
    if seen is not built:
        with flex_without_compiler():
            expected, _ = _uncompiled(call)
    executed = Executed(count_inductor=(trial.attention, trial.setting) == ("eager", "whole"))
    try:
        actual = _compiled(call, executed.backend)
    except Exception:
        _check_compiles(call)
        raise
    executed.fill(trial)
    trial.difference = _rounded(largest_difference(actual, expected))
    if not trial.difference <= TOLERANCE:
        trial.sensitivity = _rounded(sensitivity(call, expected))
    if trial.verdict == "differs":  # some models take another way when they are traced
        trial.of_graphs = _rounded(largest_difference(actual, _compiled(call, "eager")))


def _compiled(call: Call, backend: Any) -> Any:
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS):
        return _called(call, torch.compile(call.target, backend=backend))


def _check_compiles(call: Call) -> None:
    """Raises: NotBuilt: torch.compile cannot do it whatever the backend."""
    try:
        _compiled(call, "eager")
    except Exception as error:
        raise NotBuilt(f'with backend "eager": {_told(error)}') from error


def _rounded(difference: float) -> float:
    return float(f"{difference:.2g}")


def _uncompiled(call: Call) -> tuple[Any, int]:
    """(what the model returns, how many attentions it ran)."""
    function, seen = watching(call.target)
    try:
        with torch.no_grad():
            return _called(call, function), seen.sites
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"uncompiled: {_told(error)}") from error


def _called(call: Call, function: Callable[..., Any]) -> Any:
    """Models that draw random numbers draw the same ones in every call."""
    torch.manual_seed(0)
    return call.run(function)


@contextmanager
def flex_without_compiler() -> Iterator[None]:
    """transformers compiles FlexAttention by itself where nothing else compiles, which takes minutes on a CPU."""
    from transformers.integrations import flex_attention

    before, flex_attention.is_torchdynamo_compiling = flex_attention.is_torchdynamo_compiling, lambda: True
    try:
        yield
    finally:
        flex_attention.is_torchdynamo_compiling = before


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def sensitivity(call: Call, expected: Any) -> float:
    """How far the outputs move when every weight changes by its last digit: some random models amplify rounding."""
    with torch.no_grad(), _rounded_otherwise(call.module), flex_without_compiler():
        return largest_difference(_called(call, call.target), expected)


@contextmanager
def _rounded_otherwise(model: torch.nn.Module) -> Iterator[None]:
    generator = torch.Generator().manual_seed(3)
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    before = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            weight.mul_(1 + 2**-22 * (torch.rand(weight.shape, generator=generator) - 0.5))
        yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)


class Executed:
    """A backend that counts how often each of its graphs runs: layers may share one."""

    def __init__(self, count_inductor: bool) -> None:
        self.reports: list[Any] = []
        self.handed: list[int] = []  # softmaxes in each graph
        self.runs: Counter[int] = Counter()
        self.inductor: list[int] | None = [] if count_inductor else None

    def backend(self, gm: Any, example_inputs: Any) -> Any:
        self.handed.append(softmaxes_of(gm.graph))
        if self.inductor is not None:
            self.inductor.append(replaced_by_inductor(gm, example_inputs))
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
        if self.inductor is not None:
            trial.inductor = sum(self.runs[number] * count for number, count in enumerate(self.inductor))
        trial.found, trial.refused = predicates.total(), reasons.total()
        trial.predicates, trial.forms = dict(predicates), dict(forms)
        trial.reasons = [f"{times} x {reason}" for reason, times in reasons.items() if times]
        handed = sum(self.runs[number] * count for number, count in enumerate(self.handed))
        if trial.told < trial.sites and trial.told >= handed:
            trial.reasons.append(f"{trial.sites - trial.told} x {LEFT_OUT}")
            trial.refused += trial.sites - trial.told


def largest_difference(actual: Any, expected: Any) -> float:
    """The largest absolute difference of two results, over the largest value; infinite if they do not match.

    Whole numbers have to be equal: they are tokens, indices, or masks.
    """
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
            worst = worst if torch.equal(one, other) else float("inf")
            continue
        apart = torch.where(one.isnan() & other.isnan() | (one == other), 0.0, (one - other).abs().double())
        worst = max(worst, apart.nan_to_num(nan=torch.inf).max().item() if apart.numel() else 0.0)
        finite = other[other.isfinite()]
        size = max(size, finite.abs().max().item() if finite.numel() else 0.0)
    return worst / max(size, 1e-30) if 0 < worst < float("inf") else worst
