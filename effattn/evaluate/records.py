"""Results as they are written: one record for each finished piece of work. Reading a file back checks every field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A result. Unknown fields, other types and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Density(Record):
    """Kept of allowed pairs, mean over the attentions of the model, where structure alone decides it."""

    length: int
    policy: str
    density: float


class Looked(Record):
    """What short runs told beforehand."""

    sites: int
    short: int  # tokens of the shorter run
    short_seconds: float
    long: int
    long_seconds: float
    site_seconds: float  # of measuring one attention of the longer run
    compilation: float  # seconds
    densities: list[Density]
    notes: list[str]


class FormAtSite(Record):
    """One policy at one attention; see :class:`effattn.evaluate.tasks.site_errors.FormErrors`."""

    policy: str
    form: str
    reason: str  # why this form
    error: float | None  # None: dense is zero and the form is not
    mass: float
    density: float
    oracle_mass: float
    oracle_density: float
    block: int
    unit: int | None = None  # keys that are chosen together, where that is not ``block``
    mass_by_head: list[float]


class SiteErrors(Record):
    """All policies at one attention of a run over ``length`` tokens."""

    length: int
    number: int  # in the order of the run
    layer: int | None
    name: str
    heads: int
    rows: int
    keys: int
    forms: list[FormAtSite]
    seconds: float


class ErrorsDone(Record):
    """A run over ``length`` tokens reached all its attentions."""

    length: int
    sites: int
    left_alone: list[str]  # softmaxes without a site, and why


class TextLoss(Record):
    """Perplexity of one text is exp(loss)."""

    length: int
    policy: str
    segment: int
    loss: float  # mean negative log likelihood of a token, in nats
    tokens: int  # that were predicted
    seconds: float  # of the layers; the first of a policy compiles


class PasskeyAnswer(Record):
    """One hidden key and what the model answered."""

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
    first: float  # with compilation, where nothing else ran before
    later: list[float]
    peak_gib: float | None  # largest memory of the later ones, weights included; None on the CPU
