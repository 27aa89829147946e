"""Checks of single values in a policy. Problems carry key paths relative to the value."""

from __future__ import annotations

import datetime
import math
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from effattn.lowering.forms import FORMS, Params
from effattn.policy import write
from effattn.policy.locate import Path
from effattn.policy.problems import given, problems_of, unknown


def refuse(problems: list[tuple[Path, str]]) -> PydanticCustomError:
    """An error with its own key paths, relative to the field being validated."""
    text = "; ".join(text for _, text in problems)
    return PydanticCustomError("policy", "{text}", {"text": text, "problems": problems})


def strings(value: Any) -> tuple[str, ...]:
    """A string or a list of strings, as a tuple."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise refuse([((), f"expected a string or a list of strings, got {given(value)}")])
    if not items:
        raise refuse([((), "the list is empty; name at least one")])
    wrong: list[tuple[Path, str]] = [
        ((i,), f"expected a string, got {given(item)}") for i, item in enumerate(items) if type(item) is not str
    ]
    if wrong:
        raise refuse(wrong)
    return tuple(items)


def among(what: str, names: tuple[str, ...], allowed: Iterable[str]) -> tuple[str, ...]:
    """``names``, if each is allowed and none is repeated."""
    allowed = list(allowed)
    wrong: list[tuple[Path, str]] = []
    for i, name in enumerate(names):
        if name not in allowed:
            wrong.append(((i,), unknown(what, name, allowed)))
        elif name in names[:i]:
            wrong.append(((i,), f"{what} {name!r} is named twice"))
    if wrong:
        raise refuse(wrong)
    return names


def facts(value: Any) -> Any:
    """A table of TOML values in plain types; refuses values that TOML cannot hold."""
    if not isinstance(value, Mapping):
        return value
    wrong: list[tuple[Path, str]] = []
    try:
        kept = _plain(value, (), wrong)
    except RecursionError:
        wrong = [((), "nested too deeply")]
    if wrong:
        raise refuse(wrong)
    return kept


def _plain(value: Any, path: Path, wrong: list[tuple[Path, str]]) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item, (*path, str(name)), wrong) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, number), wrong) for number, item in enumerate(value)]
    for kind in (bool, str, int, float):  # converts subclasses, such as NumPy's float64
        if isinstance(value, kind):
            value = kind(value)
            break
    if not _has_spelling(value):
        wrong.append((path, f"expected what TOML holds (strings, numbers, dates, lists, tables), got {given(value)}"))
    return value


def _has_spelling(value: Any) -> bool:
    """Whether the value survives writing and reading TOML; a time with a time zone, for one, does not."""
    try:
        again = tomllib.loads(f"value = {write.value(value)}".encode().decode())["value"]
    except (ValueError, TypeError):
        return False
    return again == value or (again != again and value != value)


def for_json(value: Any) -> Any:
    """The value with dates, infinities and NaN as text."""
    if isinstance(value, dict):
        return {name: for_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [for_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else value


def params_of(form: str, table: Any) -> tuple[Params | None, list[tuple[Path, str]]]:
    """(parameters of ``form`` from a table, problems); the parameters are None if there are problems."""
    kind = FORMS[form].params
    if isinstance(table, kind):
        return table, []
    if not isinstance(table, Mapping):
        return None, [((form,), f"expected a table, got {given(table)}")]
    try:
        return kind.model_validate(dict(table)), []
    except ValidationError as error:
        return None, problems_of(error, {0: (f"parameter of form {form!r}", kind.model_fields)}, (form,))
