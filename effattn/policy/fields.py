"""Checks of single values in a policy: each answers with key paths of its own, relative to the value."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from effattn.lowering.forms import FORMS, Params
from effattn.policy.locate import Path
from effattn.policy.problems import given, problems_of, unknown


def refuse(problems: list[tuple[Path, str]]) -> PydanticCustomError:
    """An error that carries key paths of its own, relative to the field that is being validated."""
    text = "; ".join(text for _, text in problems)
    return PydanticCustomError("policy", "{text}", {"text": text, "problems": problems})


def strings(value: Any) -> tuple[str, ...]:
    """A string or a list of strings."""
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
    """``names`` if each is allowed and none comes twice."""
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
    """Strings, numbers and dates; anything else has no place in a record of where numbers came from."""
    if not isinstance(value, Mapping):
        return value
    kept: dict[Any, Any] = {}
    wrong: list[tuple[Path, str]] = []
    for name, fact in value.items():
        if isinstance(fact, (datetime.date, datetime.time)):
            kept[name] = fact.isoformat()
        elif isinstance(fact, float) and not math.isfinite(fact):
            wrong.append(((str(name),), f"expected a finite number, got {fact}"))
        elif isinstance(fact, (str, int, float)):
            kept[name] = fact
        else:
            wrong.append(((str(name),), f"expected a string, a number or a date, got {given(fact)}"))
    if wrong:
        raise refuse(wrong)
    return kept


def params_of(form: str, table: Any) -> tuple[Params | None, list[tuple[Path, str]]]:
    """The parameters of ``form`` from a table, or None and what is wrong with it."""
    kind = FORMS[form].params
    if isinstance(table, kind):
        return table, []
    if not isinstance(table, Mapping):
        return None, [((form,), f"expected a table, got {given(table)}")]
    try:
        return kind.model_validate(dict(table)), []
    except ValidationError as error:
        return None, problems_of(error, {0: (f"parameter of form {form!r}", kind.model_fields)}, (form,))
