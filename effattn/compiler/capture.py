"""Query, key and value of every attention of a real run, as the rewritten graph would hand them to the op."""

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
    """One attention of one run. The tensors are the model's own: read them, and keep none beyond ``receive``."""

    number: int  # in the order in which the run reached it
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
    """What one run had: how many attentions were reached."""

    receive: Callable[[Captured], None]
    reached: int = 0


class Tapped:
    """A model that can be run with somebody looking at its attentions; compiled once for all lengths.

    The model computes what its user wrote; attention is only looked at, one site at a time, so that no more than one
    site's tensors are held because of it. Works for whatever the backend finds sites in.
    """

    def __init__(self, model: Any):
        """``model``: a module or function; it is not changed."""
        self.missed: list[Missed] = []  # softmaxes that were left alone, of all graphs
        self._run: Run | None = None
        self._compiled = torch.compile(model, backend=self._backend, dynamic=True)

    @torch.no_grad()
    def run(self, receive: Callable[[Captured], None], *args: Any, **kwargs: Any) -> int:
        """Run the model once and hand every attention to ``receive`` when the run reaches it.

        Args:
            receive: called in the order of the run; what it raises ends the run.
            args, kwargs: handed to the model.

        Returns:
            How many attentions were reached.
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
    """One run of a :class:`Tapped` model."""
    return Tapped(model).run(receive, *args, **kwargs)
