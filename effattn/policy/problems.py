"""Messages for mistakes in a policy: where, what was given, what is allowed, and the nearest match."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from effattn.errors import PolicyError
from effattn.policy.locate import Path, line_among, line_of, lines_of

# pydantic's error type to the expected value
EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "mapping_type": "a table",
}
TYPE_NAMES = {
    bool: "a boolean",
    str: "a string",
    int: "an integer",
    float: "a float",
    list: "a list",
    tuple: "a list",
    dict: "a table",
    type(None): "nothing",
    datetime.date: "a date",
    datetime.datetime: "a date",
    datetime.time: "a time",
}


@dataclass(frozen=True)
class Origin:
    """The source of a policy: a file name or description, and the TOML text if there is one."""

    label: str
    text: str | None = None

    def place(self, path: Path) -> str:
        """``line 7, key rule[0].layers``, as far as it is known."""
        line = line_of(self.text, path) if self.text is not None else None
        key = spelled(path)
        return ", ".join(part for part in (f"line {line}" if line else "", f"key {key}" if key else "") if part)

    def error(self, problems: Iterable[tuple[Path, str]]) -> PolicyError:
        """One error with all problems."""
        parts = []
        if self.text is not None:
            lines = lines_of(self.text)
            problems = sorted(problems, key=lambda problem: line_among(lines, problem[0]) or 0)
        for path, text in problems:
            place = self.place(path)
            parts.append(f"{place}: {text}" if place else text)
        if len(parts) == 1:
            return PolicyError(
                f"{self.label}, {parts[0]}" if parts[0][:4] in ("line", "key ") else f"{self.label}: {parts[0]}"
            )
        return PolicyError(f"{self.label}: {len(parts)} problems\n" + "\n".join(f"  {part}" for part in parts))


def spelled(path: Path) -> str:
    """``("rule", 0, "layers")`` as ``rule[0].layers``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def given(value: Any) -> str:
    """A value and its type, shortened."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{shown} ({TYPE_NAMES.get(type(value), type(value).__name__)})"


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """``unknown form 'powr'; did you mean 'power'? Allowed: ...``; ``what`` may contain " of "."""
    names = list(allowed)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    suggestion = f"; did you mean {near[0]!r}?" if near else "."
    noun, of, owner = what.partition(" of ")
    return f"unknown {noun} {name!r}{of}{owner}{suggestion} Allowed: {', '.join(names) or 'none'}"


def problems_of(
    error: ValidationError, allowed_keys: Mapping[int, tuple[str, Iterable[str]]], prefix: Path = ()
) -> list[tuple[Path, str]]:
    """Every problem of a pydantic error as (key path, text).

    ``allowed_keys`` maps the depth of a table (the number of table names above the key) to (what its keys are called,
    the allowed keys), for messages on unknown keys. effattn's own validators may attach a list of problems.
    """
    found: list[tuple[Path, str]] = []
    for detail in error.errors(include_url=False):
        path = prefix + tuple(detail["loc"])
        if (own := detail.get("ctx", {}).get("problems")) is not None:
            found.extend((path + below, text) for below, text in own)
        elif detail["type"] == "extra_forbidden":
            depth = sum(isinstance(part, str) for part in detail["loc"]) - 1
            what, names = allowed_keys.get(depth, ("key", ()))
            found.append((path, unknown(what, str(path[-1]), names)))
        elif detail["type"] == "missing":
            found.append((path[:-1], f"the key {path[-1]!r} is missing"))
        elif detail["type"] == "tuple_type" and isinstance(detail["input"], Mapping):
            found.append((path, f"expected an array of tables: write [[{spelled(path)}]] instead of [{spelled(path)}]"))
        elif detail["type"] in EXPECTED:
            found.append((path, f"expected {EXPECTED[detail['type']]}, got {given(detail['input'])}"))
        elif detail["type"] == "value_error":
            found.append((path, detail["msg"].removeprefix("Value error, ")))
        else:
            found.append((path, f"{_lower(detail['msg'])}, got {given(detail['input'])}"))
    return found


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
