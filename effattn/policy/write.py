"""A policy as TOML text. Only fields that were set are written, in the documented order."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any


def value(item: Any) -> str:
    """One TOML value: a string, boolean, number, date or time, or a list or table of these."""
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, str):
        # JSON's escapes are valid in TOML, which also requires one for DEL
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(item, int):
        return str(item)
    if isinstance(item, float):
        return repr(item)
    if isinstance(item, (datetime.date, datetime.time)):
        return item.isoformat()
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{key(name)} = {value(part)}" for name, part in item.items()) + "}"
    if isinstance(item, (list, tuple)):
        return "[" + ", ".join(value(part) for part in item) + "]"
    raise TypeError(f"not a TOML value: {item!r}")


def key(name: str) -> str:
    """A key, quoted only if TOML requires it."""
    bare = name and all(char.isascii() and (char.isalnum() or char in "-_") for char in name)
    return name if bare else value(name)


def pairs(table: Mapping[str, Any], indent: str = "") -> list[str]:
    """Lines ``key = value``."""
    return [f"{indent}{key(name)} = {value(item)}" for name, item in table.items()]


def rule(body: Mapping[str, Any]) -> str:
    """One ``[[rule]]`` with its parameter tables, from ``Rule.to_dict``."""
    lines = ["[[rule]]", *pairs({name: item for name, item in body.items() if name != "params"})]
    for form, params in body.get("params", {}).items():
        lines += [f"  [rule.params.{key(form)}]", *pairs(params, "  ")]
    return "\n".join(lines) + "\n"


def policy(body: Mapping[str, Any]) -> str:
    """A whole file, from ``Policy.to_dict``."""
    head = {name: item for name, item in body.items() if name not in ("provenance", "rule")}
    parts = ["\n".join(pairs(head)) + "\n"]
    if body.get("provenance"):
        parts.append("\n".join(["[provenance]", *pairs(body["provenance"])]) + "\n")
    parts += [rule(item) for item in body.get("rule", ())]
    return "\n".join(parts)
