"""The policies that ship with effattn, as files."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources


def shipped() -> tuple[str, ...]:
    """Names of the policies that ship with effattn."""
    return _shipped()


def shipped_text(name: str) -> str:
    """The text of a shipped policy, with comments."""
    return (resources.files("effattn") / "policies" / f"{name}.toml").read_text("utf-8")


@lru_cache(maxsize=1)
def _shipped() -> tuple[str, ...]:
    folder = resources.files("effattn") / "policies"
    return tuple(sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")))
