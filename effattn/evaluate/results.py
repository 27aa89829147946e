"""The results of one evaluation as data."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from effattn.evaluate.records import (
    Density,
    PasskeyAnswer,
    PrefillTime,
    Record,
    SiteErrors,
    TextLoss,
)
from effattn.evaluate.store import FORMAT


class Results(Record):
    """What was measured.

    ``about`` has model, text, device, versions, date and the whole setting, policies included.
    """

    format: str = FORMAT
    about: dict[str, Any]
    notes: list[str] = Field(default_factory=list)
    densities: list[Density] = Field(default_factory=list)
    sites: list[SiteErrors] = Field(default_factory=list)
    losses: list[TextLoss] = Field(default_factory=list)
    passkeys: list[PasskeyAnswer] = Field(default_factory=list)
    times: list[PrefillTime] = Field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return list(self.about["lengths"])

    @property
    def policies(self) -> list[str]:
        return [str(policy["name"]) for policy in self.about["policies"]]
