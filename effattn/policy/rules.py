"""The policy and its rules: pydantic records with validation, files, and the choice of a rule for a site."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
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
    ValidationInfo,
    field_validator,
)

from effattn.errors import PolicyError, PolicyNotFound
from effattn.ir.site import STAGES, Site
from effattn.lowering.forms import FORMS, Params
from effattn.policy import fields, write
from effattn.policy import layers as layer_ranges
from effattn.policy.locate import Path
from effattn.policy.problems import Origin, given, problems_of, unknown

SCHEMA = 1
LARGEST_FILE = 1 << 20  # bytes
DEFAULT = "exact"
AUTO = "auto"  # stands before forms of which the cheapest is to be taken
_TOML_LINE = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$")


class Rule(BaseModel):
    """One row of a policy: where it holds, which forms are allowed there, and their parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[tuple[StrictStr, ...], BeforeValidator(fields.strings)] = Field(
        default=(), description="class names or globs; one enclosing module must match. Left out: any model"
    )
    layers: str | None = Field(
        default=None, description='such as "2-29", "0-3, 8, 20-" or "0-1 of every 7". Left out: all layers'
    )
    site: Annotated[tuple[StrictStr, ...], BeforeValidator(fields.strings)] = Field(
        default=(), description='paths of modules or globs, such as "decoder.*". Left out: anywhere in the model'
    )
    stage: Annotated[tuple[StrictStr, ...], BeforeValidator(fields.strings)] = Field(
        default=(), description=f"one or more of {', '.join(STAGES)}. Left out: any stage"
    )
    min_length: StrictInt = Field(
        default=0, ge=0, description="keys; with fewer the site computes exact attention. Decided when the op runs"
    )
    forms: Annotated[tuple[StrictStr, ...], BeforeValidator(fields.strings)] = Field(
        description="allowed forms, the preferred one first; exact is always the last resort. With auto before them, "
        "the cheapest at the length of a call"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="parameters by form")

    @field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> str | None:
        return None if value is None else str(layer_ranges.read(value))

    @field_validator("stage")
    @classmethod
    def _known_stages(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return fields.among("stage", names, STAGES)

    @field_validator("forms")
    @classmethod
    def _known_forms(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        fields.among("form", names, [*FORMS, AUTO])
        if AUTO in names[1:]:
            raise fields.refuse([((names.index(AUTO),), f"{AUTO!r} comes first: the forms after it are chosen from")])
        if names[0] == AUTO and not set(names) - {AUTO, "exact"}:
            raise fields.refuse([((0,), f"{AUTO!r} needs forms to choose from; name them after it")])
        if "exact" in names[:-1]:
            raise fields.refuse(
                [((names.index("exact") + 1,), "forms after 'exact' are never reached: exact always applies")]
            )
        return names

    @field_validator("params", mode="before")
    @classmethod
    def _known_params(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            raise fields.refuse([((), f"expected a table, got {given(value)}")])
        listed = info.data.get("forms")  # None when that field was wrong itself
        checked: dict[str, Params] = {}
        wrong: list[tuple[Path, str]] = []
        for form, table in value.items():
            if form not in FORMS:
                wrong.append(((str(form),), unknown("form", str(form), FORMS)))
            elif listed is not None and form not in listed:
                wrong.append(((form,), f"this rule sets {form!r} but allows only {', '.join(listed)}; add it to forms"))
            else:
                params, problems = fields.params_of(form, table)
                wrong += problems
                if params is not None:
                    checked[form] = params
        if wrong:
            raise fields.refuse(wrong)
        return checked

    @property
    def automatic(self) -> bool:
        """Whether the cheapest of the forms is taken, by the length of a call, and not the first that applies."""
        return self.forms[0] == AUTO

    @property
    def preference(self) -> tuple[str, ...]:
        """The allowed forms in order, ending with ``"exact"``."""
        named = tuple(name for name in self.forms if name not in (AUTO, "exact"))
        return (*named, "exact")

    def params_of(self, form: str) -> Params:
        """The parameters of ``form`` under this rule: what the rule sets, defaults for the rest."""
        return self.params.get(form) or FORMS[form].params()

    @cached_property
    def layer_ranges(self) -> layer_ranges.Layers | None:
        return None if self.layers is None else layer_ranges.parse(self.layers)

    def matches_model(self, classes: Iterable[str]) -> bool:
        """Whether one of these class names is meant."""
        return not self.model or any(fnmatch.fnmatchcase(name, glob) for name in classes for glob in self.model)

    def matches_place(self, site: Site) -> bool:
        """Whether a site stands where the rule holds, by model and path: there its layers are counted."""
        here = not self.site or any(fnmatch.fnmatchcase(site.path, glob) for glob in self.site)
        return here and self.matches_model(site.module_classes)

    def __hash__(self) -> int:
        return hash(self.to_toml())

    def to_dict(self) -> dict[str, Any]:
        """What was set, as a policy dict would say it."""
        body: dict[str, Any] = {}
        if self.model:
            body["model"] = self.model[0] if len(self.model) == 1 else list(self.model)
        if self.layers is not None:
            body["layers"] = self.layers
        if self.site:
            body["site"] = self.site[0] if len(self.site) == 1 else list(self.site)
        if self.stage:
            body["stage"] = list(self.stage)
        if self.min_length:
            body["min_length"] = self.min_length
        body["forms"] = list(self.forms)
        params = {form: set_.model_dump(exclude_unset=True) for form, set_ in self.params.items()}
        if params:
            body["params"] = params
        return body

    def to_toml(self) -> str:
        """This rule as a ``[[rule]]`` to paste into a policy file."""
        return write.rule(self.to_dict())


@dataclass(frozen=True)
class Match:
    """What a policy says about one site. ``rule`` is None where no rule matches: the site stays exact."""

    rule: Rule | None
    index: int | None  # of the rule in the policy, from 0
    notes: tuple[str, ...] = ()


class Policy(BaseModel):
    """Which forms are allowed where. The first matching rule wins; a site that no rule matches stays exact.

    Make one with :meth:`of`, :meth:`load` or :meth:`named`. Every mistake in it raises
    :class:`effattn.errors.PolicyError`, which names the file, line and key, what is allowed and the nearest match.
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
        """A policy from whatever a user may pass: a shipped name, a path, a dict, a policy, or None for ``exact``.

        Raises:
            PolicyError: the source is none of these, or holds a mistake.
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
            PolicyError: no such file, larger than 1 MiB, not UTF-8, not TOML, or not a valid policy.
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
        name = pathlib.PurePath(label).stem.encode("utf-8", "replace").decode()  # bytes that are no text
        return cls._parse(content, label, name)

    @classmethod
    def named(cls, name: str) -> Policy:
        """A policy that ships with effattn.

        Raises:
            PolicyError: there is none of this name.
        """
        if name not in shipped():
            raise PolicyNotFound(unknown("policy", name, shipped()))
        return _named(name)

    @classmethod
    def _parse(cls, content: bytes, label: str, stem: str) -> Policy:
        if len(content) > LARGEST_FILE:
            raise PolicyError(f"{label}: larger than 1 MiB, which no policy needs to be")
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
        """The rule for a site, and what was noticed on the way."""
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
        """The first rule that matches; None: the site stays exact. ``min_length`` is left to the op."""
        return self.match(site).rule

    def check_layers(self, count: int, classes: Iterable[str] | None = None) -> None:
        """Check the layer ranges against a model of ``count`` layers.

        ``classes``: the model's module class names, if known; rules for other models are then not looked at.

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
        """Check the layer ranges against attentions of a model, where these know how many layers it has.

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
        """The policy as a dict that :meth:`of` reads back; with ``json``, dates in it are text."""
        body: dict[str, Any] = {"schema": self.schema_version, "name": self.name}
        if self.description:
            body["description"] = self.description
        if self.provenance:
            body["provenance"] = fields.for_json(self.provenance) if json else dict(self.provenance)
        if self.rules:
            body["rule"] = [rule.to_dict() for rule in self.rules]
        return body

    def to_toml(self) -> str:
        """The policy as a file that :meth:`load` reads back. Equal policies give equal text."""
        return write.policy(self.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.to_toml() == other.to_toml()

    def __hash__(self) -> int:
        return hash(self.to_toml())


def shipped() -> tuple[str, ...]:
    """The names of the policies that ship with effattn."""
    return _shipped()


def shipped_text(name: str) -> str:
    """The file of a shipped policy, with its comments."""
    return (resources.files("effattn") / "policies" / f"{name}.toml").read_text("utf-8")


@lru_cache(maxsize=1)
def _shipped() -> tuple[str, ...]:
    folder = resources.files("effattn") / "policies"
    return tuple(sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")))


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
