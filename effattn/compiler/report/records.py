"""The records of a report, as plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from effattn.compiler.report.outside import Outside
from effattn.passes.compilation import PassRecord


@dataclass(frozen=True)
class SiteReport:
    """One attention that was found."""

    name: str
    layer: int | None
    stage: str
    found_as: str
    form: str
    exact: bool
    here: str  # the form at the length of this call; exact below a policy's min_length
    predicate: str
    score: str
    reason: str
    candidates: tuple[dict[str, Any], ...]
    kernel: str | None  # path of the generated kernel, or what runs instead
    location: str
    layout: str
    empty_rows: str
    notes: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    path: str = ""  # of its module, as in named_modules()
    replaced: bool = True  # False: user code runs, and ``reason`` says why
    reads: dict[str, str] = field(default_factory=dict)  # captured tensor to its name in user code
    predicate_shown: str = ""  # with the names in user code: attention_mask[b, k] for padding[b, k]
    score_shown: str = ""
    tiles: str = ""  # how the keys to visit are found; "" where no op of ours does it


@dataclass(frozen=True)
class Counts:
    """Numbers of attentions by outcome; ``total`` is found + missed + outside."""

    found: int  # with an expression for score and mask
    replaced: int  # of those found
    missed: int  # not understood, or not replaceable; each has a reason
    outside: int  # calls that ran eagerly

    @property
    def total(self) -> int:
        return self.found + self.missed + self.outside

    @property
    def left_alone(self) -> int:
        """Attentions in compiled graphs that run as user code: missed, or found and not replaced."""
        return self.found - self.replaced + self.missed


@dataclass(frozen=True)
class MissedReport:
    """A softmax or SDPA call that was left alone."""

    name: str
    location: str
    reason: str
    hint: str = ""
    attention: bool = True  # False: a softmax of something else, as in a router
    rule: str = ""  # a value of effattn.ir.refusal.Why
    cause: str = ""  # "file:line: code" of the operation named in the reason


@dataclass
class GraphReport:
    """One graph of the model."""

    sites: tuple[SiteReport, ...]
    missed: tuple[MissedReport, ...]
    before: str
    after: str
    erased: int
    seconds: dict[str, float]
    failure: str | None
    passes: tuple[PassRecord, ...] = ()  # in order of execution
    calls: int = 0  # in the explained call: layers of a loop with a graph break share one graph

    def ran(self) -> None:
        self.calls += 1


@dataclass
class Contents:
    """What a report on one model says; graphs are in the order of compilation."""

    graphs: list[GraphReport]
    policy: str
    policy_toml: str
    stanza: str
    shortcomings: tuple[str, ...] = ()  # what the policy asks for and does not get, each with a hint
    outside: tuple[Outside, ...] = ()  # attention that ran eagerly, in no graph

    @property
    def sites(self) -> list[SiteReport]:
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def missed(self) -> list[MissedReport]:
        return [missed for graph in self.graphs for missed in graph.missed]

    @property
    def counts(self) -> Counts:
        return Counts(
            found=len(self.sites),
            replaced=sum(site.replaced for site in self.sites),
            missed=sum(missed.attention for missed in self.missed),
            outside=sum(one.calls for one in self.outside),
        )

    @property
    def seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for graph in self.graphs:
            total.update(graph.seconds)
        return dict(total)

    def graph(self, before: bool = False, number: int = 0) -> str:
        """The code of graph ``number``, as Dynamo made it (``before``) or rewritten."""
        if not 0 <= number < len(self.graphs):
            raise IndexError(f"the model has {len(self.graphs)} graphs, there is no graph {number}")
        return self.graphs[number].before if before else self.graphs[number].after


def ranges(numbers: list[int]) -> str:
    """Layers as policies write them: "0-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][-1:] = [parts[-1][0], number] if len(parts[-1]) == 1 else [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
