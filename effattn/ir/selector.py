"""How a form decides at run time what a query block attends to: Score -> Reduce -> Pick -> Expand, as data.

A selector is a record of four pieces and no code. The runtime turns it and the tensors of a call into a *block list*:
for each batch row, list head and query block the units of keys that are visited, and how many of them each query head
takes. A dynamic form is a function from its parameters to such a record; a new one needs a new kernel only if it
needs a new piece.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from effattn.errors import PlanError

KEY_HEADS = -1  # as many lists as key heads
BOUNDARIES = "boundaries"  # name of the load that says where chunks begin


class Piece(BaseModel):
    """Frozen, hashable, and nothing but what its fields say."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# --- Score: which vectors are multiplied ---


class Strided(Piece):
    """One vector of every ``stride`` tokens, the first of each group."""

    kind: Literal["strided"] = "strided"
    stride: PositiveInt = 1


class Mean(Piece):
    """The mean of every ``size`` tokens in float32, times the root of how many there are if ``root_length``."""

    kind: Literal["mean"] = "mean"
    size: PositiveInt
    root_length: bool = False


class Last(Piece):
    """The vectors of the last ``size`` rows alone."""

    kind: Literal["last"] = "last"
    size: PositiveInt


class Chunks(Piece):
    """Chunk means as :class:`Mean`, of chunks that the data cuts.

    ``dip``: a chunk begins where the keys before and after a token are least alike: where the cosine of the means of
    ``width`` keys on both sides is below ``threshold`` and the least within ``apart`` tokens.
    ``given``: where the load named ``boundaries``, bool [B, Nk], says so.
    """

    kind: Literal["chunks"] = "chunks"
    find: Literal["dip", "given"] = "dip"
    width: PositiveInt = 4
    apart: PositiveInt = 8
    threshold: float = 0.9
    root_length: bool = True


class Trained(Piece):
    """Chunk means as :class:`Mean`, of chunks that a trained predictor cuts (DHSA v1, arXiv 2510.24606).

    A chunk begins where the predictor's logit is above ``threshold`` and no greater one that begins a chunk itself lies
    within ``apart`` tokens; at most ``per_block`` chunks for every ``block`` keys, those with the greatest logits.
    ``weights`` is a safetensors file and ``digest`` its SHA-256 when the plan was made: another file is refused at run
    time. ``layer``: whose weights are taken if the file holds some for each layer.
    """

    kind: Literal["trained"] = "trained"
    weights: str
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    layer: int | None = Field(default=None, ge=0)
    threshold: float = 1.1
    apart: PositiveInt = 8
    block: PositiveInt = 128
    per_block: PositiveInt = 8
    root_length: bool = True


class Score(Piece):
    """Products of query vectors and key vectors.

    ``lists``: 0 for a score of each query head; n: query heads are averaged in n groups, and so are their key heads;
    ``KEY_HEADS``: in one group for each key head.
    ``softmax``: over the keys that the mask allows; products are then scaled as the site's score says. Without it they
    are used as they are: good for ranking within a row.
    """

    query: Annotated[Strided | Mean | Last, Field(discriminator="kind")]
    key: Annotated[Strided | Mean | Chunks | Trained, Field(discriminator="kind")]
    lists: int = Field(default=0, ge=KEY_HEADS)
    softmax: bool = False


class Reduce(Piece):
    """From vectors to one number a query block and unit of keys; where a side is a mean there is nothing to reduce."""

    rows: Literal["max", "mean"] = "max"
    columns: Literal["max", "sum"] = "max"


# --- Pick: how many ---


class TopFraction(Piece):
    """This share of the units of all keys, in every row; at least ``least`` tokens."""

    kind: Literal["top_fraction"] = "top_fraction"
    share: float = Field(gt=0, le=1)
    least: int = Field(default=0, ge=0)


class Tokens(Piece):
    """This many tokens in every row."""

    kind: Literal["tokens"] = "tokens"
    tokens: PositiveInt


class TopP(Piece):
    """As many units as hold ``gamma`` of the mass that a score of each head finds; at least ``least`` tokens.

    ``ranks_last``: the last query block is ranked by that mass too, by the largest of a list's heads.
    """

    kind: Literal["top_p"] = "top_p"
    ranks_last: bool = False
    gamma: float = Field(gt=0, le=1)
    least: int = Field(default=0, ge=0)
    score: Score
    reduce: Reduce


class Pick(Piece):
    """The best units within a budget. Forced ones count: the query block's own, sinks and the most recent."""

    budget: Annotated[TopFraction | Tokens | TopP, Field(discriminator="kind")]
    sinks: int = Field(default=0, ge=0)
    local: int = Field(default=0, ge=0)

    def forced_units(self, unit: int) -> tuple[int, int]:
        """How many units of this size hold the sinks, and how many the most recent tokens."""
        return -(-self.sinks // unit), -(-self.local // unit)


class Expand(Piece):
    """Sizes in tokens: rows that share a list, and keys that are visited together (1: single tokens)."""

    block: PositiveInt = 128
    unit: PositiveInt = 128


class Selector(Piece):
    """The whole of it."""

    score: Score
    reduce: Reduce = Reduce()
    pick: Pick
    expand: Expand

    @property
    def needs_boundaries(self) -> bool:
        return isinstance(self.score.key, Chunks) and self.score.key.find == "given"

    def keeps_all(self, k_len: int) -> bool:
        """Whether the budget covers every key of this many, whatever the data: then dense attention is the same."""
        budget = self.pick.budget
        if isinstance(budget, Tokens):
            return budget.tokens >= k_len
        if isinstance(budget, TopFraction):
            return budget.share == 1 or budget.least >= k_len
        return budget.gamma == 1 or budget.least >= k_len

    @staticmethod
    def decode(body: object) -> Selector:
        """The selector in the JSON values of a plan.

        Raises:
            PlanError: not what :meth:`model_dump` gives.
        """
        try:
            return Selector.model_validate(body)
        except ValidationError as error:
            raise PlanError(f"a plan holds no valid selector: {error}") from error
