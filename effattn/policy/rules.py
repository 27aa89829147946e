"""One rule of a policy, validated: where it applies, which forms are allowed there, and their parameters."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
)

from effattn.ir.site import STAGES, Site
from effattn.lowering.forms import FORMS, Params
from effattn.policy import fields, write
from effattn.policy import layers as layer_ranges
from effattn.policy.locate import Path
from effattn.policy.problems import given, unknown

AUTO = "auto"  # first in ``forms``: choose the cheapest of the others


class Rule(BaseModel):
    """One rule of a policy: where it applies, which forms are allowed there, and their parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[tuple[StrictStr, ...], BeforeValidator(fields.strings)] = Field(
        default=(), description="class names or globs; one enclosing module must match. Default: any model"
    )
    layers: str | None = Field(
        default=None, description='such as "2-29", "0-3, 8, 20-" or "0-1 of every 7". Default: all layers'
    )
    site: Annotated[tuple[StrictStr, ...], BeforeValidator(fields.strings)] = Field(
        default=(), description='module paths or globs, such as "decoder.*". Default: the whole model'
    )
    stage: Annotated[tuple[StrictStr, ...], BeforeValidator(fields.strings)] = Field(
        default=(), description=f"one or more of {', '.join(STAGES)}. Default: any stage"
    )
    min_length: StrictInt = Field(
        default=0, ge=0, description="keys; with fewer, attention is exact. Decided when the op runs"
    )
    forms: Annotated[tuple[StrictStr, ...], BeforeValidator(fields.strings)] = Field(
        description="allowed forms in order of preference; exact always comes last. With auto first, the cheapest one "
        "at the length of a call"
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
        listed = info.data.get("forms")  # None if that field is invalid
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
        """Whether the cheapest form at the length of a call is used, instead of the first that applies."""
        return self.forms[0] == AUTO

    @property
    def preference(self) -> tuple[str, ...]:
        """The allowed forms in order, ending with ``"exact"``."""
        named = tuple(name for name in self.forms if name not in (AUTO, "exact"))
        return (*named, "exact")

    def params_of(self, form: str) -> Params:
        """The parameters of ``form`` under this rule, with defaults for those it does not set."""
        return self.params.get(form) or FORMS[form].params()

    @cached_property
    def layer_ranges(self) -> layer_ranges.Layers | None:
        return None if self.layers is None else layer_ranges.parse(self.layers)

    def matches_model(self, classes: Iterable[str]) -> bool:
        """Whether ``model`` matches one of these class names."""
        return not self.model or any(fnmatch.fnmatchcase(name, glob) for name in classes for glob in self.model)

    def matches_place(self, site: Site) -> bool:
        """Whether model and path of a site match; its layers are then compared with ``layers``."""
        here = not self.site or any(fnmatch.fnmatchcase(site.path, glob) for glob in self.site)
        return here and self.matches_model(site.module_classes)

    def __hash__(self) -> int:
        return hash(self.to_toml())

    def to_dict(self) -> dict[str, Any]:
        """The fields that were set, as in a policy dict."""
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
        """The rule as a ``[[rule]]`` for a policy file."""
        return write.rule(self.to_dict())
