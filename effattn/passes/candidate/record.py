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
    """The scores of one attention: their sizes, the index of each dimension, and the reader for their terms."""

    batch: Any
    heads: Any
    q_len: Any
    k_len: Any
    index: tuple[Any, ...]  # one term in b, h, q, k per dimension of the scores
    reader: Reader


@dataclass(frozen=True)
class Loop:
    """What linear attention written as a loop has besides query, key, value and rate."""

    initial: fx.Node | None  # the state before the first token; None: zero
    final: fx.Node | None  # the state after the last token; None: unused
    rising: tuple[fx.Node, ...] = ()  # decay tables, as in effattn::checked_decay
    falling: tuple[fx.Node, ...] = ()
    triangles: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Dropout:
    """Live dropout of the weights: the node that drops them, and the index of each of its dimensions.

    These are those of the scores where ``node`` is an SDPA call.
    """

    node: fx.Node
    probability: float
    index: tuple[Any, ...]

    @classmethod
    def read(cls, node: fx.Node, probability: Any, index: tuple[Any, ...]) -> Dropout:
        """Raises Refused if the probability is no constant below 1."""
        if not isinstance(probability, (int, float)):
            raise Refused(
                Why.DROPOUT,
                "the probability of attention dropout is decided when the model runs",
                "let only batch and length be dynamic: torch._dynamo.mark_dynamic(tensor, dim) instead of dynamic=True",
            )
        if not 0 < probability < 1:
            raise Refused(Why.DROPOUT, f"attention dropout p={probability} drops every weight", "make p less than 1")
        return cls(node, float(probability), index)


@dataclass(frozen=True)
class MatchedNodes:
    """The graph nodes of an attention. Only checks, rewriting and verify read them."""

    anchor: fx.Node  # the softmax, SDPA call or weights; gives the site its name and location
    replaced: fx.Node
    query: Operand
    key: Operand
    value: Operand
    _: KW_ONLY
    scores: CaptureSource | None = None  # the softmax's input before sink and shift; weights if there is no softmax
    sdpa: Mapping[str, Any] | None = None  # the arguments of the SDPA call by name; None: it is not SDPA
    before: fx.Node | None = None  # where the replacement is inserted; None: before ``replaced``
    lse: fx.Node | None = None  # the LSE in base 2; None: unused
    sink: CaptureSource | float | None = None  # sink scores [B, H, Nq, n]: they take weight and have no value
    loop: Loop | None = None
    dropout: Dropout | None = None
    products: tuple[fx.Node, ...] = ()  # other products that belong to it, not to be read as attention of their own

    @property
    def operands(self) -> dict[str, Operand]:
        return {"query": self.query, "key": self.key, "value": self.value}

    @property
    def is_plain_sdpa(self) -> bool:
        """Whether it is already SDPA without a mask, which runs SDPA's own kernels."""
        return self.sdpa is not None and self.sdpa.get("attn_mask") is None


@dataclass(frozen=True)
class Match:
    """A site that can be replaced, and the graph nodes of what its spec names, in the spec's order."""

    site: Site
    nodes: MatchedNodes
    scores_index: tuple[Any, ...]  # as ``ScoreSpace.index``
    placement: Placement
    captures: tuple[CaptureSource, ...]
    scalars: tuple[SizeSource, ...]
    numbers: tuple[fx.Node, ...]
    threshold: float = FILL  # scores at or below it are masked out


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
    """An attention as it was read from an anchor, before any check."""

    nodes: MatchedNodes
    found_as: str
    space: ScoreSpace
    out_index: tuple[Any, ...]  # one term in b, h, q and depth per dimension of the replaced tensor
    term: Any = None  # the scores before the softmax, with s for the raw score
    linear: LinearSpec | None = None  # the weights, where there is no softmax
    zero_when_empty: bool = True  # queries without keys give 0, as in SDPA; False: NaN, as in a softmax of -inf
    nan_when_empty: bool = False  # queries without keys are 0 / 0, whatever masks them
    zeroed: tuple[Zeroed, ...] = ()  # where weights are set to zero after the softmax
    nan_is_zero: bool = False  # NaN weights are set to zero
    autocast: bool = False  # the product of query and key already ran in the dtype of the result
    notes: tuple[str, ...] = ()
