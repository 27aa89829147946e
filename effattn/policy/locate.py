"""The line of a key in a TOML text, for error messages. The text must be valid TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

Path = tuple[str | int, ...]

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'  # multi-line strings first, since they start with the same character
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
    r"|\n"
    r"|[\[\]{}=.,]"
    r"|[^\s\[\]{}=.,\#\"']+",
    re.DOTALL,
)


def line_of(text: str, path: Path) -> int | None:
    """The line (from 1) that sets ``path`` or its nearest parent with a line; None if there is none."""
    return line_among(lines_of(text), path)


def line_among(lines: dict[Path, int], path: Path) -> int | None:
    """Like :func:`line_of`, from the result of :func:`lines_of`."""
    for length in range(len(path), 0, -1):
        if (line := lines.get(path[:length])) is not None:
            return line
    return None


def lines_of(text: str) -> dict[Path, int]:
    """Key path to line of every table header and every ``key = value``; paths into arrays of tables have an index."""
    lines: dict[Path, int] = {}
    arrays: dict[Path, int] = {}  # array of tables to index of its last table
    table: Path = ()
    for line, kind, keys in _statements(text):
        base = table if kind == "key" else ()
        path = _resolved((), keys[:-1], arrays) if kind != "key" else base + tuple(keys[:-1])
        path = (*path, keys[-1])
        if kind == "array":
            arrays[path] = arrays.get(path, -1) + 1
            lines.setdefault(path, line)
            path = (*path, arrays[path])
        for length in range(1, len(path) + 1):  # "a.b.c = 1" also creates tables a and a.b
            lines.setdefault(path[:length], line)
        if kind != "key":
            table = path
    return lines


def _resolved(start: Path, keys: list[str], arrays: dict[Path, int]) -> Path:
    path = start
    for key in keys:
        path = (*path, key)
        if path in arrays:
            path = (*path, arrays[path])
    return path


def _statements(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """(line, "key" | "table" | "array", key parts) of each statement."""
    keys: list[str] = []
    kind, depth, line = "", 0, 1
    for found in _TOKEN.finditer(text):
        token = found[0]
        if token == "\n" and depth == 0:
            if kind in ("table", "array") and keys:
                yield line, kind, keys
            kind, keys = "", []
        elif token.startswith("#") or token == "\n":
            pass
        elif kind == "value":
            depth += (token in "[{") - (token in "]}")
        elif token == "[":
            kind = "array" if kind == "table" else "table"
        elif token == "=":
            yield line, "key", keys
            kind, keys = "value", []
        elif token not in ("]", "."):
            kind = kind or "key"
            keys.append(_unquoted(token))
        line += token.count("\n")
    if kind in ("table", "array") and keys:
        yield line, kind, keys


def _unquoted(token: str) -> str:
    return str(tomllib.loads(f"key = {token}")["key"]) if token[0] in "\"'" else token
