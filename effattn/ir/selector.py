"""How a form chooses keys at run time: the pieces Score, Reduce, Pick and Expand, as data.

The runtime evaluates a selector on the tensors of a call. The result is a *block list*: for each batch, list head and
query block, the units of keys to visit, and how many of them each query head takes. A dynamic form is a function from
its parameters to a selector; it needs a new kernel only if it needs a new piece.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from effattn.errors import PlanError

KEY_HEADS = -1  # one list per key head
BOUNDARIES = "boundaries"  # name of the captured tensor that says where chunks begin


class Piece(BaseModel):
    """Base of all pieces: frozen, hashable, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# --- Score: which vectors are multiplied ---


class Strided(Piece):
    """The first vector of every ``stride`` tokens."""

    kind: Literal["strided"] = "strided"
    stride: PositiveInt = 1


class Mean(Piece):
    """The float32 mean of every ``size`` tokens; ``root_length`` multiplies it by the square root of their number."""

    kind: Literal["mean"] = "mean"
    size: PositiveInt
    root_length: bool = False


class Last(Piece):
    """The vectors of the last ``size`` queries only."""

    kind: Literal["last"] = "last"
    size: PositiveInt


class Chunks(Piece):
    """Chunk means, as in :class:`Mean`, over chunks whose boundaries depend on data.

    ``dip``: a chunk begins where the keys before and after a token are least alike: the cosine of the means of
    ``width`` keys on either side is below ``threshold`` and is the minimum within ``apart`` tokens.
    ``given``: boundaries come from the captured tensor ``boundaries``, bool [B, Nk].
    """

    kind: Literal["chunks"] = "chunks"
    find: Literal["dip", "given"] = "dip"
    width: PositiveInt = 4
    apart: PositiveInt = 8
    threshold: float = 0.9
    root_length: bool = True


class Trained(Piece):
    """Chunk means, as in :class:`Mean`, over chunks cut by a trained predictor (DHSA v1, arXiv 2510.24606).

    A chunk begins where the predictor's logit is above ``threshold`` and no boundary with a greater logit lies within
    ``apart`` tokens. At most ``per_block`` chunks begin in every ``block`` keys, those with the greatest logits.
    ``weights`` is a safetensors file and ``digest`` its SHA-256 when the plan was made; a file that differs is refused
    at run time. ``layer`` selects the weights in a file that has some for each layer.
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

    ``lists``: 0 scores every query head; n averages query heads, and their key heads, in n groups; ``KEY_HEADS`` makes
    one group per key head.
    ``softmax``: over the keys that the mask allows, with the site's scale. Without it products are used unscaled, which
    is enough to rank the keys of one query.
    """

    query: Annotated[Strided | Mean | Last, Field(discriminator="kind")]
    key: Annotated[Strided | Mean | Chunks | Trained, Field(discriminator="kind")]
    lists: int = Field(default=0, ge=KEY_HEADS)
    softmax: bool = False


class Reduce(Piece):
    """One number for each query block and unit of keys. A side that is already a mean is not reduced."""

    rows: Literal["max", "mean"] = "max"
    columns: Literal["max", "sum"] = "max"


# --- Pick: how many ---


class TopFraction(Piece):
    """This share of all units of keys, for every query; at least ``least`` tokens."""

    kind: Literal["top_fraction"] = "top_fraction"
    share: float = Field(gt=0, le=1)
    least: int = Field(default=0, ge=0)


class Tokens(Piece):
    """This many tokens, for every query."""

    kind: Literal["tokens"] = "tokens"
    tokens: PositiveInt


class TopP(Piece):
    """As many units as hold the share ``gamma`` of each head's softmax mass; at least ``least`` tokens.

    ``ranks_last``: units of the last query block are also ranked by that mass, the maximum over the heads of a list.
    """

    kind: Literal["top_p"] = "top_p"
    ranks_last: bool = False
    gamma: float = Field(gt=0, le=1)
    least: int = Field(default=0, ge=0)
    score: Score
    reduce: Reduce


class Pick(Piece):
    """The best units within a budget. Forced units count: the query block's own, sinks and the most recent."""

    budget: Annotated[TopFraction | Tokens | TopP, Field(discriminator="kind")]
    sinks: int = Field(default=0, ge=0)
    local: int = Field(default=0, ge=0)

    def forced_units(self, unit: int) -> tuple[int, int]:
        """Numbers of units of this size that hold the sinks and the most recent tokens."""
        return -(-self.sinks // unit), -(-self.local // unit)


class Expand(Piece):
    """Sizes in tokens: queries that share a list, and keys that are visited together (1: single tokens)."""

    block: PositiveInt = 128
    unit: PositiveInt = 128


class Selector(Piece):
    """The whole selector."""

    score: Score
    reduce: Reduce = Reduce()
    pick: Pick
    expand: Expand

    @property
    def needs_boundaries(self) -> bool:
        return isinstance(self.score.key, Chunks) and self.score.key.find == "given"

    def keeps_all(self, k_len: int) -> bool:
        """Whether the budget covers ``k_len`` keys, whatever the data. Dense attention is then the same."""
        budget = self.pick.budget
        if isinstance(budget, Tokens):
            return budget.tokens >= k_len
        if isinstance(budget, TopFraction):
            return budget.share == 1 or budget.least >= k_len
        return budget.gamma == 1 or budget.least >= k_len

    @staticmethod
    def decode(body: object) -> Selector:
        """The selector from the JSON values of a plan.

        Raises:
            PlanError: the values are not what :meth:`model_dump` gives.
        """
        try:
            return Selector.model_validate(body)
        except ValidationError as error:
            raise PlanError(f"a plan holds no valid selector: {error}") from error
