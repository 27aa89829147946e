"""The policy: its file, its rules in order, and the rule for a site."""

from __future__ import annotations

import os
import pathlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)

from effattn.errors import PolicyError, PolicyNotFound
from effattn.ir.site import Site
from effattn.policy import fields, write
from effattn.policy.locate import Path
from effattn.policy.problems import Origin, given, problems_of, unknown
from effattn.policy.rules import Rule
from effattn.policy.shipped import shipped, shipped_text

SCHEMA = 1
LARGEST_FILE = 1 << 20  # bytes
DEFAULT = "exact"
_TOML_LINE = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$")


@dataclass(frozen=True)
class Match:
    """The rule of a policy for one site; None if no rule matches, and the site stays exact."""

    rule: Rule | None
    index: int | None  # of the rule in the policy
    notes: tuple[str, ...] = ()


class Policy(BaseModel):
    """Which forms are allowed where. The first matching rule wins; a site without one stays exact.

    Create it with :meth:`of`, :meth:`load` or :meth:`named`. Mistakes raise :class:`effattn.errors.PolicyError`, which
    names the file, line and key, what is allowed, and the nearest match.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: StrictInt = Field(default=SCHEMA, alias="schema", description="version of this format: 1")
    name: StrictStr = Field(default="unnamed", min_length=1, max_length=200, description="for reports")
    description: StrictStr = Field(default="", description="for people")
    provenance: Annotated[dict[StrictStr, Any], BeforeValidator(fields.facts)] = Field(
        default_factory=dict, description="where it comes from: model revision, device, date, error measured"
    )
    rules: tuple[Rule, ...] = Field(default=(), alias="rule", description="first match wins")

    _origin: Origin = PrivateAttr(default=Origin("policy"))

    def __init__(self, /, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise Origin("policy").error(_problems(error)) from error

    @field_validator("schema_version")
    @classmethod
    def _this_schema(cls, value: int) -> int:
        if value != SCHEMA:
            raise ValueError(f"this version of effattn reads schema {SCHEMA}, got {value}")
        return value

    @classmethod
    def of(cls, source: str | os.PathLike | Mapping[str, Any] | Policy | None) -> Policy:
        """A policy from a shipped name, a path, a dict, a policy, or None for ``exact``.

        Raises:
            PolicyError: ``source`` is none of these, or the policy is invalid.
        """
        if source is None:
            return cls.named(DEFAULT)
        if isinstance(source, Policy):
            return source
        if isinstance(source, Mapping):
            return cls._build(source, Origin("policy dict"))
        if isinstance(source, str):
            if source in shipped():
                return cls.named(source)
            if not (source.endswith(".toml") or set(source) & set("/\\") or os.path.exists(source)):
                raise PolicyNotFound(f"{unknown('policy', source, shipped())}, or the path of a .toml file")
            return cls.load(source)
        if isinstance(source, os.PathLike):
            return cls.load(source)
        raise PolicyError(f"a policy is a name, a path, a dict or a Policy; got {given(source)}")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Policy:
        """Read a policy file.

        Raises:
            PolicyError: the file is missing, larger than 1 MiB, not UTF-8, not TOML, or an invalid policy.
        """
        label = os.fsdecode(path)
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise PolicyNotFound(f"{label}: not a regular file")
            with open(path, "rb") as file:
                content = file.read(LARGEST_FILE + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PolicyNotFound(f"{label}: cannot read this policy file ({reason})") from error
        name = pathlib.PurePath(label).stem.encode("utf-8", "replace").decode()  # file names may not be valid UTF-8
        return cls._parse(content, label, name)

    @classmethod
    def named(cls, name: str) -> Policy:
        """A policy that ships with effattn.

        Raises:
            PolicyError: there is no such policy.
        """
        if name not in shipped():
            raise PolicyNotFound(unknown("policy", name, shipped()))
        return _named(name)

    @classmethod
    def _parse(cls, content: bytes, label: str, stem: str) -> Policy:
        if len(content) > LARGEST_FILE:
            raise PolicyError(f"{label}: larger than 1 MiB, too large for a policy")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise PolicyError(f"{label}, line {line}: not UTF-8 text") from error
        try:
            body = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise PolicyError(_not_toml(label, text, error)) from error
        return cls._build({"name": stem, **body}, Origin(label, text))

    @classmethod
    def _build(cls, body: Mapping[str, Any], origin: Origin) -> Policy:
        wrong = [((), f"keys are strings, got {given(key)}") for key in body if not isinstance(key, str)]
        if wrong:
            raise origin.error(wrong)
        try:
            policy = cls(**body)
        except PolicyError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            raise origin.error(_problems(error.__cause__)) from None
        policy._origin = origin
        return policy

    def match(self, site: Site) -> Match:
        """The rule for a site, with notes on rules that could not be decided."""
        notes = []
        for index, rule in enumerate(self.rules):
            if (rule.stage and site.stage not in rule.stage) or not rule.matches_place(site):
                continue
            if rule.layer_ranges is not None:
                if site.layer is None:
                    notes.append(
                        f"rule[{index}] of policy {self.name!r} names layers {rule.layers}, but which layer this is "
                        "is not known; compile the whole model instead of single layers"
                    )
                    continue
                if site.layer not in rule.layer_ranges:
                    continue
            return Match(rule, index, tuple(notes))
        return Match(None, None, tuple(notes))

    def rule_for(self, site: Site) -> Rule | None:
        """The first rule that matches; None: the site stays exact. ``min_length`` is applied by the op."""
        return self.match(site).rule

    def check_layers(self, count: int, classes: Iterable[str] | None = None) -> None:
        """Check the layer ranges against a model of ``count`` layers.

        ``classes``: class names of the model's modules, if known; rules for other models are then skipped.

        Raises:
            PolicyError: a rule names a layer that the model does not have.
        """
        names = None if classes is None else tuple(classes)
        wrong: list[tuple[Path, str]] = []
        for index, rule in enumerate(self.rules):
            if rule.layer_ranges is None or (names is not None and not rule.matches_model(names)):
                continue
            if (problem := rule.layer_ranges.beyond(count)) is not None:
                wrong.append((("rule", index, "layers"), problem))
        if wrong:
            raise self._origin.error(wrong)

    def check_sites(self, sites: Iterable[Site]) -> None:
        """Check the layer ranges against sites whose layer count is known.

        Raises:
            PolicyError: a rule names a layer that the model does not have.
        """
        sites = list(sites)
        wrong: list[tuple[Path, str]] = []
        for index, rule in enumerate(self.rules):
            counts = [site.layer_count for site in sites if site.layer_count is not None and rule.matches_place(site)]
            if rule.layer_ranges is not None and counts:
                problem = rule.layer_ranges.beyond(max(counts))
                wrong += [(("rule", index, "layers"), problem)] if problem is not None else []
        if wrong:
            raise self._origin.error(wrong)

    def to_dict(self, *, json: bool = False) -> dict[str, Any]:
        """The policy as a dict for :meth:`of`; with ``json``, dates are text."""
        body: dict[str, Any] = {"schema": self.schema_version, "name": self.name}
        if self.description:
            body["description"] = self.description
        if self.provenance:
            body["provenance"] = fields.for_json(self.provenance) if json else dict(self.provenance)
        if self.rules:
            body["rule"] = [rule.to_dict() for rule in self.rules]
        return body

    def to_toml(self) -> str:
        """The policy as text for :meth:`load`. Equal policies give equal text."""
        return write.policy(self.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.to_toml() == other.to_toml()

    def __hash__(self) -> int:
        return hash(self.to_toml())


@lru_cache(maxsize=32)
def _named(name: str) -> Policy:
    return Policy._parse(shipped_text(name).encode(), f"shipped policy {name}", name)


def _problems(error: ValidationError) -> list[tuple[Path, str]]:
    keys = [field.alias or name for name, field in Policy.model_fields.items()]
    return problems_of(error, {0: ("key", keys), 1: ("key of a rule", Rule.model_fields)})


def _not_toml(label: str, text: str, error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return f"{label}: not a policy (nested too deeply)"
    found = _TOML_LINE.search(str(error))
    reason = str(error)[: found.start()] if found else str(error)
    if found is None:
        return f"{label}: not valid TOML: {reason}"
    line = int(found[1]) if found[1] else text.count("\n") + 1
    shown = text.splitlines()[line - 1].strip() if line <= len(text.splitlines()) else ""
    return f"{label}, line {line}: not valid TOML: {reason}" + (f"\n    {shown[:100]}" if shown else "")
