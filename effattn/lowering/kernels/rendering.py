"""Renders templates, with the device functions that they call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jinja2

from effattn.lowering.dialects.triton import starting
from effattn.lowering.dialects.triton.device_functions import DEVICE_FUNCTIONS

STARTING = (  # for use in launchers
    "allocator",
    "data_strides",
    "described",
    "multiprocessors",
    "sizes_of",
    "start",
    "strides",
)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def template_named(name: str) -> jinja2.Template:
    return _environment().get_template(name)


def helpers_for(body: str, functions: Mapping[str, str] = DEVICE_FUNCTIONS) -> str:
    """Device functions that ``body`` calls, directly or not."""
    wanted: list[str] = []
    for name in functions:
        if f"{name}(" in body or any(f"{name}(" in functions[other] for other in wanted):
            wanted.append(name)
    return "".join(f"{functions[name].strip()}\n\n\n" for name in reversed(wanted))


def tidy(source: str) -> str:
    """Without the empty lines that a template leaves, and with the names that it imports written out."""
    names = (name for name in STARTING if re.search(rf"\b{name}\(", source))
    source = source.replace(f"from {starting.__name__} import *", f"from {starting.__name__} import {', '.join(names)}")
    source = re.sub(r"[ \t]+\n", "\n", source)
    source = re.sub(r"\n{4,}", "\n\n\n", source)
    source = re.sub(r"(\n    [^\n]*)\n{3,}(?=    )", r"\1\n\n", source)
    return source.strip() + "\n"
