"""The result of matching: a site, and the graph nodes that the rewriting needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import sympy
from torch import fx

from effattn.ir.linear import LinearSpec
from effattn.ir.refusal import Refusal, Why
from effattn.ir.site import Site
from effattn.passes.candidate.operands import Operand
from effattn.passes.candidate.placement import Placement
from effattn.passes.graph.provenance import code_line, location, module_path
from effattn.passes.masks.split import FILL
from effattn.passes.symbolic import CaptureSource, Reader

FOUND_AS = "effattn_found_as"  # meta key: the call in user code from which a pass made the node


@dataclass(frozen=True)
class SizeSource:
    """Where a symbolic length comes from: a node that is the number, or a dimension of a tensor node."""

    node: fx.Node
    dim: int | None = None


@dataclass(frozen=True)
class ScoreSpace:
    """The scores of one attention: their sizes, how their dimensions are indexed, and who reads them."""

    batch: Any
    heads: Any
    q_len: Any
    k_len: Any
    index: tuple[Any, ...]  # of the dimensions of the scores, in b, h, q, k
    reader: Reader


@dataclass(frozen=True)
class Loop:
    """What linear attention that is written as a loop has beside query, key, value and rate."""

    initial: fx.Node | None  # the state before the first token, None if it is zero
    final: fx.Node | None  # the node of the state after the last
    rising: tuple[fx.Node, ...] = ()  # tables of decay, as in effattn::checked_decay
    falling: tuple[fx.Node, ...] = ()
    triangles: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class MatchedNodes:
    """The graph side of an attention, as its anchor names it. Only checks, rewriting and verify read it."""

    anchor: fx.Node  # the node of the softmax, SDPA call or weights: names and locations come from it
    replaced: fx.Node
    query: Operand
    key: Operand
    value: Operand
    _: KW_ONLY
    scores: CaptureSource | None = None  # what the softmax is taken of, before a sink and any shift, or weights
    sdpa: Mapping[str, Any] | None = None  # SDPA's arguments by name, where the scores are those of an SDPA call
    before: fx.Node | None = None  # where the replacement goes, if not where ``replaced`` is
    lse: fx.Node | None = None  # the node of the LSE in base 2, if it is used
    sink: CaptureSource | float | None = None  # more scores of each row, [B, H, Nq, n]: take weight, have no value
    loop: Loop | None = None
    products: tuple[fx.Node, ...] = ()  # that it is made of, beside ``replaced``: no attention of their own

    @property
    def operands(self) -> dict[str, Operand]:
        return {"query": self.query, "key": self.key, "value": self.value}

    @property
    def is_plain_sdpa(self) -> bool:
        """Already SDPA without a mask: its own kernels run."""
        return self.sdpa is not None and self.sdpa.get("attn_mask") is None


@dataclass(frozen=True)
class Match:
    """A site that can be replaced, and where the graph holds what its spec names, in the same order."""

    site: Site
    nodes: MatchedNodes
    scores_index: tuple[Any, ...]  # as in its ScoreSpace
    placement: Placement
    captures: tuple[CaptureSource, ...]
    scalars: tuple[SizeSource, ...]
    numbers: tuple[fx.Node, ...]
    threshold: float = FILL  # scores above it are allowed, at or below it masked


@dataclass(frozen=True)
class Missed:
    """A softmax or SDPA call that is left alone, and why."""

    name: str
    location: str
    refusal: Refusal

    @classmethod
    def at(cls, node: fx.Node, refusal: Refusal) -> Missed:
        """Named by the module that computes ``node``."""
        return cls(module_path(node) or node.name, location(node), refusal)


class Refused(Exception):
    """Leaves one softmax alone; carries the reason. ``at``: the node named in the reason."""

    def __init__(self, rule: Why, reason: str, hint: str = "", at: fx.Node | None = None):
        super().__init__(reason)
        self.refusal = Refusal(rule, reason, hint, "" if at is None else code_line(at))


def require_fixed(heads: Any, *widths: Any) -> None:
    """Require static numbers of heads and widths, which are compiled into kernels.

    Raises:
        Refused: one of them is symbolic.
    """
    if not all(sympy.sympify(size).is_Integer for size in (heads, *widths)):
        raise Refused(
            Why.SIZES,
            "the number of heads or head_dim is a symbolic size",
            "let only batch and length be dynamic: torch._dynamo.mark_dynamic(tensor, dim) instead of dynamic=True",
        )


@dataclass(frozen=True)
class Zeroed:
    """``node`` zeroes weights where ``where`` (in b, h, q, k) holds. ``nan_too``: by filling, not by multiplying."""

    where: Any
    node: fx.Node
    nan_too: bool = True


@dataclass(frozen=True)
class Candidate:
    """An attention as an anchor reads it, before anything is checked."""

    nodes: MatchedNodes
    found_as: str
    space: ScoreSpace
    out_index: tuple[Any, ...]  # of the dimensions of what is replaced, in b, h, q and depth
    term: Any = None  # the scores before softmax, with s for the raw score
    linear: LinearSpec | None = None  # what stands for them where there is no softmax
    zero_when_empty: bool = True  # SDPA gives 0 for a row without keys where a softmax of -inf gives NaN
    nan_when_empty: bool = False  # such a row is 0 / 0, whatever masks it
    zeroed: tuple[Zeroed, ...] = ()  # where weights become zero after softmax
    nan_is_zero: bool = False  # weights that are NaN become zero
    autocast: bool = False  # the product of query and key already ran in the result's type
    notes: tuple[str, ...] = ()
