"""The choice made for a site, and the forms that were considered for it."""

from __future__ import annotations

from dataclasses import dataclass

from effattn.ir.plan import Plan
from effattn.ir.refusal import Refusal, Why
from effattn.lowering.forms import FORMS
from effattn.lowering.forms.form import Params
from effattn.passes.candidate.record import Match
from effattn.passes.choose.routes import Route


@dataclass(frozen=True)
class Considered:
    """One form that was considered for a site."""

    form: str
    accepted: bool
    refusals: tuple[Refusal, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(map(str, self.refusals))

    @property
    def rules(self) -> tuple[Why, ...]:
        return tuple(refusal.rule for refusal in self.refusals)


@dataclass(frozen=True)
class Choice:
    """What is done with a site.

    ``route``: "keep" leaves the node as it is, "sdpa" writes an SDPA call without a mask, "op" writes
    ``effattn::attend`` with ``plan``, "features" writes feature maps and ``effattn::linear``. "linear" writes
    ``effattn::linear`` at a site without a softmax; its form is "exact", as the function is the user's own.
    """

    match: Match
    form: str
    params: Params
    route: Route
    reason: str
    plan: Plan | None
    considered: tuple[Considered, ...]
    target: str | None = None  # the target of an op without a plan

    @property
    def exact(self) -> bool:
        return FORMS[self.form].kind == "exact"
