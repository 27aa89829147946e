"""Query, key and value of every attention in a real run, as the rewritten graph would pass them to the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effattn.compiler.pipeline import observe_sites
from effattn.ir.site import Site
from effattn.passes.candidate.record import Match, Missed


@dataclass(frozen=True)
class Captured:
    """One attention of one run. The tensors are the model's own: do not write them or keep them after ``receive``."""

    number: int  # order of execution
    match: Match
    query: Tensor  # [B, Hq, Nq, D]
    key: Tensor  # [B, Hkv, Nk, D]
    value: Tensor  # [B, Hkv, Nk, Dv]
    captures: Sequence[Tensor] = ()
    scalars: Sequence[int] = ()
    numbers: Sequence[float] = ()

    @property
    def site(self) -> Site:
        return self.match.site

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Nq, Nk)."""
        batch, heads, rows, _ = self.query.shape
        return batch, heads, rows, self.key.shape[2]


@dataclass
class Run:
    """The state of one run."""

    receive: Callable[[Captured], None]
    reached: int = 0


class Tapped:
    """A model whose attentions can be observed while it runs. Compiled once, with dynamic shapes.

    The model computes what user code says; attention is only observed. At most one site's tensors are held for it.
    """

    def __init__(self, model: Any):
        """``model``: a module or function; it is not changed."""
        self.missed: list[Missed] = []  # softmaxes of all graphs that were left alone
        self._run: Run | None = None
        self._compiled = torch.compile(model, backend=self._backend, dynamic=True)

    @torch.no_grad()
    def run(self, receive: Callable[[Captured], None], *args: Any, **kwargs: Any) -> int:
        """Run the model once and pass every attention to ``receive`` when the run reaches it.

        Args:
            receive: called in order of execution; an exception ends the run.
            args, kwargs: passed to the model.

        Returns:
            The number of attentions.
        """
        run = self._run = Run(receive)
        try:
            with torch._dynamo.config.patch(recompile_limit=64):
                self._compiled(*args, **kwargs)
        finally:
            self._run = None
        return run.reached

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        def observe(number: int, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
            if (run := self._run) is not None:
                index, run.reached = run.reached, run.reached + 1
                run.receive(Captured(index, outcome.matches[number], query, key, value, *rest))

        outcome = observe_sites(gm, observe, example_inputs)
        self.missed += outcome.missed
        return gm.forward


def capture(model: Any, receive: Callable[[Captured], None], *args: Any, **kwargs: Any) -> int:
    """Run a model once as :class:`Tapped`."""
    return Tapped(model).run(receive, *args, **kwargs)
