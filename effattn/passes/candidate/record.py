"""What matching hands on: a site, and the graph nodes that the rewriting needs and nobody else looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from effattn.ir.refusal import Refusal, Why
from effattn.ir.site import Site
from effattn.passes.candidate.operands import Operand
from effattn.passes.candidate.placement import Placement
from effattn.passes.graph.provenance import code_line, location, module_path
from effattn.passes.masks.split import FILL
from effattn.passes.symbolic import CaptureSource, Reader

FOUND_AS = "effattn_found_as"  # in a node's meta: what the user called, where a pass wrote the node


@dataclass(frozen=True)
class SizeSource:
    """Where a symbolic length comes from: a node that is the number, or a dimension of a tensor node."""

    node: fx.Node
    dim: int | None = None


@dataclass(frozen=True)
class Anchors:
    """The graph side of a match. Only the rewriting reads it."""

    replaced: fx.Node
    anchor: str  # name of the softmax or SDPA node
    scores: CaptureSource | None  # what the softmax is taken of, before a sink and any shift; None: of an SDPA call
    scores_index: tuple[Any, ...]  # index of its scores' dimensions in b, h, q, k
    query: Operand
    key: Operand
    value: Operand
    placement: Placement
    captures: tuple[CaptureSource, ...]  # as in site.spec.captures
    scalars: tuple[SizeSource, ...]  # as in site.spec.scalars
    numbers: tuple[fx.Node, ...]  # as in site.spec.numbers
    threshold: float = FILL  # scores above it are allowed, at or below it masked
    is_plain_sdpa: bool = False  # already SDPA without a mask: its own kernels run, nothing to replace
    sdpa: Mapping[str, Any] | None = None  # SDPA's arguments by name, where the scores are those of an SDPA call
    before: fx.Node | None = None  # where the replacement goes, if not where ``replaced`` is
    lse: fx.Node | None = None  # the node of the LSE in base 2, if it is used
    sink: CaptureSource | float | None = None  # more scores of each row, [B, H, Nq, n]: take weight, have no value

    @property
    def is_sdpa(self) -> bool:
        return self.sdpa is not None


@dataclass(frozen=True)
class Match:
    """A site that can be replaced."""

    site: Site
    anchors: Anchors


@dataclass(frozen=True)
class Missed:
    """A softmax or SDPA that is left alone, and why."""

    name: str
    location: str
    refusal: Refusal

    @classmethod
    def at(cls, node: fx.Node, refusal: Refusal) -> Missed:
        """Called by the module that ``node`` is computed in."""
        return cls(module_path(node) or node.name, location(node), refusal)


class Refused(Exception):
    """Raised inside matching to leave one softmax alone; carries the reason. ``at``: the node that the reason names."""

    def __init__(self, rule: Why, reason: str, hint: str = "", at: fx.Node | None = None):
        super().__init__(reason)
        self.refusal = Refusal(rule, reason, hint, "" if at is None else code_line(at))


def require_fixed(heads: Any, *widths: Any) -> None:
    """Heads and their widths are compiled into kernels.

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
    """Where ``node`` makes weights zero: a boolean in b, h, q, k. ``nan_too``: set to zero, not multiplied by it."""

    where: Any
    node: fx.Node
    nan_too: bool = True


@dataclass
class Draft:
    """A site while it is being put together."""

    anchor: fx.Node  # the softmax or SDPA node: names and locations come from it
    replaced: fx.Node
    found_as: str
    query: Operand
    key: Operand
    value: Operand
    batch: Any
    heads: Any
    q_len: Any
    k_len: Any
    head_dim: Any
    value_dim: Any
    term: Any  # the scores before softmax, with s for the raw score
    scores_index: tuple[Any, ...]
    out_index: tuple[Any, ...]
    reader: Reader
    zero_when_empty: bool  # SDPA gives 0 for a row without keys where a softmax of -inf gives NaN
    nan_when_empty: bool = False  # such a row is 0 / 0, whatever masks it
    scores: CaptureSource | None = None  # what the softmax is taken of
    is_plain_sdpa: bool = False
    sdpa: Mapping[str, Any] | None = None  # the call's arguments by name
    before: fx.Node | None = None
    lse: fx.Node | None = None
    sink: CaptureSource | float | None = None
    autocast: bool = False  # the product of query and key already ran in the result's type
    zeroed: tuple[Zeroed, ...] = ()  # where weights become zero after softmax
    nan_is_zero: bool = False  # weights that are NaN become zero
    notes: list[str] = field(default_factory=list)
