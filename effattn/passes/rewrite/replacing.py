"""Replacement of sites in a graph, each as a whole or not at all. Used by every pass that inserts ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

from effattn.errors import RewriteError
from effattn.passes.candidate.failures import left_alone
from effattn.passes.candidate.operands import Operand, emit
from effattn.passes.candidate.record import MatchedNodes
from effattn.passes.candidate.stand_ins import leave_stand_ins
from effattn.passes.compilation import Compilation
from effattn.passes.graph.dead_code import erase_orphans
from effattn.passes.graph.insertion import Inserter, difference, fake_mode
from effattn.passes.graph.known_values import Known
from effattn.passes.graph.view import GraphView
from effattn.passes.rewrite.maps import Maps
from effattn.passes.rewrite.memory_order import in_order_of
from effattn.passes.symbolic import CaptureSource

Pairs = Sequence[tuple[fx.Node, fx.Node]]  # (node, replacement)


@dataclass(frozen=True)
class Emitted:
    """The nodes written for one site."""

    result: fx.Node  # [B, H, Nq, Dv]
    also: Pairs = ()  # further replacements
    alike: Callable[[torch.Tensor, torch.Tensor], bool] = lambda old, new: False  # as in ``Rewriting.replace``


class Rewriting:
    """The replacements of one pass. ``finish`` erases replaced nodes; until then the view stays valid."""

    def __init__(self, work: Compilation):
        self.view, self.saved = work.view, SavedCaptures(work.view)
        self.known, self.maps = Known(work.view, work.inputs), Maps()
        self._left_alone = partial(left_alone, missed=work.outcome.missed, strict=work.strict)
        self.replaced: dict[fx.Node, fx.Node] = {}  # node -> replacement
        self.drawn: set[fx.Node] = set()
        self._before, self._inserted = len(work.graph.nodes), 0

    @contextmanager
    def at(self, nodes: MatchedNodes) -> Iterator[Writer]:
        """A writer for the replacement of a site. If the body raises, its nodes are removed and the site is left
        alone."""
        with self._left_alone(nodes.replaced), self.view.graph.inserting_before(nodes.before or nodes.replaced):
            writer = Writer(self, nodes.replaced)
            try:
                yield writer
            except BaseException:
                writer.undo()
                raise
            self._inserted += len(writer.nodes)

    def replace(
        self,
        writer: Writer,
        pairs: Pairs,
        *,
        keeps_result: bool = False,
        alike: Callable[[torch.Tensor, torch.Tensor], bool] = lambda old, new: False,
        drawn: fx.Node | None = None,
    ) -> None:
        """Make all users of the first node of each pair use the second.

        Args:
            keeps_result: the gradient needs the result, so it is copied if the graph writes it later.
            alike: whether a replacement fits although its shape is a different expression.
            drawn: a node whose random numbers the replacement draws.

        Raises:
            RewriteError: a replacement has another shape, dtype or device.
        """
        finished: list[tuple[fx.Node, fx.Node]] = []
        for old, new in pairs:
            values = old.meta["example_value"], new.meta["example_value"]
            if not alike(*values) and (wrong := difference(*values)):
                raise RewriteError(f"replacement of {old.name} is {wrong}")
            new = in_order_of(self.view, writer, old, new)
            if keeps_result and self.view.writes_between(old, self.view.time[old], len(self.view.time)):
                new = writer.method("clone", new)
            finished.append((old, new))
        for old, new in finished:
            old.replace_all_uses_with(new)
            self.replaced[old] = new
        if drawn is not None:
            self.drawn.add(drawn)

    def leave_stand_ins(self, weights: set[str]) -> list[fx.Node]:
        """See :func:`effattn.passes.candidate.stand_ins.leave_stand_ins`; returns the nodes that may be erased."""
        written, unread = leave_stand_ins(self.view, list(self.replaced), weights)
        self._inserted += written
        return unread

    def finish(self, orphans: Sequence[fx.Node] = ()) -> int:
        """Erase nodes that are no longer used. Returns the number of erased nodes."""
        self.saved.erase_unused()
        erase_orphans(self.view, [*self.replaced, *orphans], self.drawn)
        return self._before + self._inserted + len(self.saved.copies) - len(self.view.graph.nodes)


class Writer(Inserter):
    """Inserts the replacement of one site. It reads the replacements of other sites."""

    def __init__(self, rewriting: Rewriting, like: fx.Node):
        super().__init__(rewriting.view.graph, like)
        self.view, self.saved, self.replaced = rewriting.view, rewriting.saved, rewriting.replaced
        self.known, self.maps = rewriting.known, rewriting.maps

    def now(self, node: fx.Node) -> fx.Node:
        """The node that now has the value ``node`` had when it was matched."""
        return self.replaced.get(node, node)

    def operands(self, nodes: MatchedNodes) -> list[fx.Node]:
        """Query, key and value as [B, H, N, D], in the dtype of the result, to which autocast may have cast them."""
        dtype = nodes.replaced.meta["example_value"].dtype
        return [self._operand(operand, dtype) for operand in nodes.operands.values()]

    def _operand(self, operand: Operand, dtype: torch.dtype) -> fx.Node:
        node = emit(self.graph, replace(operand, node=self.now(operand.node)), self.annotate)
        return node if node.meta["example_value"].dtype == dtype else self.method("to", node, dtype)

    def load(self, source: CaptureSource, time: int) -> fx.Node:
        """A captured tensor as user code read it, for a reader at ``time``."""
        return self.now(self.saved.at(source, time))


class SavedCaptures:
    """Captured tensors as user code read them. If memory is written in between, a copy is made before the write."""

    def __init__(self, view: GraphView):
        self.view = view
        self.copies: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def at(self, source: CaptureSource, time: int) -> fx.Node:
        writers = self.view.writes_between(source.node, source.time - 1, time)
        if not writers:
            return source.node
        key = (source.node, writers[0])
        if key not in self.copies:
            with self.view.graph.inserting_before(writers[0]):
                copy = self.view.graph.call_method("clone", (source.node,))
            copy.meta.update({k: v for k, v in source.node.meta.items() if k in ("stack_trace", "nn_module_stack")})
            with fake_mode(source.node):
                copy.meta["example_value"] = source.node.meta["example_value"].clone()
            self.copies[key] = copy
        return self.copies[key]

    def erase_unused(self) -> None:
        """Erase copies for sites that were left alone after all."""
        for key, copy in list(self.copies.items()):
            if not copy.users:
                self.view.graph.erase_node(copy)
                del self.copies[key]
