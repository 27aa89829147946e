"""Results on disk: one record per finished piece of work. Every field is checked when a file is read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A result. Unknown fields, wrong types, infinities and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Density(Record):
    """Kept pairs / allowed pairs, mean over the attentions of a model, if it does not depend on data."""

    length: int
    policy: str
    density: float


class Looked(Record):
    """Results of the short runs at the beginning."""

    sites: int
    short: int  # tokens of the shorter run
    short_seconds: float
    long: int
    long_seconds: float
    site_seconds: float  # to measure one attention of the longer run
    compilation: float  # seconds
    densities: list[Density]
    notes: list[str]


class FormAtSite(Record):
    """One policy at one attention; see :class:`effattn.evaluate.tasks.site_errors.FormErrors`."""

    policy: str
    form: str
    reason: str  # why this form
    error: float | None  # None: the dense output is zero and the form's is not
    mass: float
    density: float
    oracle_mass: float
    oracle_density: float
    block: int
    unit: int | None = None  # keys chosen together, if not ``block``
    mass_by_head: list[float]


class SiteErrors(Record):
    """All policies at one attention of a run over ``length`` tokens."""

    length: int
    number: int  # order of execution
    layer: int | None
    name: str
    heads: int
    rows: int
    keys: int
    forms: list[FormAtSite]
    seconds: float


class ErrorsDone(Record):
    """A run over ``length`` tokens has finished."""

    length: int
    sites: int
    left_alone: list[str]  # softmaxes that are not sites, and why


class TextLoss(Record):
    """The loss on one text; its perplexity is exp(loss)."""

    length: int
    policy: str
    segment: int
    loss: float  # mean negative log likelihood per token, in nats
    tokens: int  # number of predicted tokens
    seconds: float  # of the layers; includes compilation for the first text of a policy


class PasskeyAnswer(Record):
    """One hidden key and the model's answer."""

    length: int
    policy: str
    depth: float
    trial: int
    tokens: int  # of the prompt
    key: str
    answer: str
    found: bool
    seconds: float


class PrefillTime(Record):
    """Seconds of a forward of the layers over ``length`` tokens."""

    length: int
    policy: str
    first: float  # includes compilation if no task ran before
    later: list[float]
    peak_gib: float | None  # peak memory of the later forwards, weights included; None on a CPU
