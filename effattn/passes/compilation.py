"""Shared by all passes: the graph being compiled, the results so far, and the base class of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from effattn.passes.graph.view import GraphView

if TYPE_CHECKING:
    from effattn.passes.candidate.record import Match, Missed
    from effattn.passes.canonicalize.assumed import Assumed
    from effattn.passes.choose.record import Choice
    from effattn.policy import Policy


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one graph."""

    name: str
    seconds: float
    changed: bool
    nodes: tuple[int, int]  # before and after
    difference: str = ""  # unified diff of the graph's code, if requested

    def __str__(self) -> str:
        before, after = self.nodes
        size = f"{before} -> {after} nodes" if self.changed else f"{after} nodes"
        return f"{self.name}: {size}, {1000 * self.seconds:.1f} ms"


@dataclass
class Outcome:
    """What the passes did to one graph."""

    matches: list[Match] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    original: fx.Graph | None = None  # the graph as Dynamo made it; None: it cannot hold attention
    canonical: fx.Graph | None = None  # the matched graph, on request; None: the original
    assumed: list[Assumed] = field(default_factory=list)  # what every call checks of the model's own tensors
    erased: int = 0
    passes: list[PassRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # in total: "passes" and "rest"

    @property
    def changed(self) -> bool:
        return any(choice.route != "keep" for choice in self.choices)


@dataclass
class Compilation:
    """One graph on its way through the passes."""

    gm: fx.GraphModule
    policy: Policy
    inputs: Sequence[Any] = ()  # the tensors of the first call; tables and masks in buffers are read
    strict: bool = False  # raise unexpected exceptions, instead of refusing the site
    target: str | None = None
    keep_canonical: bool = False
    outcome: Outcome = field(default_factory=Outcome)
    taken: set[fx.Node] = field(default_factory=set)  # nodes that were replaced or are observed
    _view: GraphView | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def view(self) -> GraphView:
        """The current graph; cached between changes."""
        if self._view is None:
            self._view = GraphView(self.gm.graph)
        return self._view

    def forget_view(self) -> None:
        """Call after the graph changed."""
        self._view = None


class Pass:
    """One step of the pipeline. An instance serves one graph and may keep what ``undo`` needs.

    Attributes:
        name: a verb, shown in the report and by ``EFFATTN_DEBUG=passes``.
        fills: the field of the outcome that it fills, if any.
        needs: fields that earlier passes must fill.
        optional: without it fewer sites are found, but no wrong ones; if it fails, the other passes still run.
    """

    name: ClassVar[str]
    fills: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False

    def apply(self, work: Compilation) -> bool:
        """Run the pass. Returns whether the graph changed, which makes views stale."""
        raise NotImplementedError

    def undo(self, work: Compilation) -> bool:
        """Restore what no site used, after all passes, last pass first. Returns as ``apply``."""
        return False


class RunWithout(Exception):
    """An optional pass turned out to be useless: the graph is compiled again without it."""

    def __init__(self, unwanted: type[Pass]):
        super().__init__(unwanted.name)
        self.unwanted = unwanted


MakesPass = Callable[[], Pass]  # a class of passes, or a function that creates one
