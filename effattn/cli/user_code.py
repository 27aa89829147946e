"""Functions that a command-line argument names: ``module:function`` or ``file.py:function``. Their code is run."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from effattn.errors import EffattnError


class UserCodeError(EffattnError):
    """There is no such module, file or function, or importing it failed."""


def function_named(name: str) -> Callable[..., Any]:
    """The function that ``name`` stands for. Raises UserCodeError."""
    place, _, attribute = name.rpartition(":")
    module = _module(place)
    if not attribute.isidentifier():
        raise UserCodeError(f"{name!r}: after the colon goes the name of a function")
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        raise UserCodeError(f"{place} has no function {attribute!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return function


def _module(place: str) -> ModuleType:
    if not place:
        raise UserCodeError("before the colon goes a module or a Python file")
    try:
        if place.endswith(".py"):
            if not os.path.isfile(place):
                raise UserCodeError(f"there is no file {place}")
            spec = importlib.util.spec_from_file_location(pathlib.Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            sys.path.insert(0, str(pathlib.Path(place).resolve().parent))
            spec.loader.exec_module(module)
            return module
        sys.path.insert(0, os.getcwd())
        return importlib.import_module(place)
    except UserCodeError:
        raise
    except Exception as error:
        raise UserCodeError(f"cannot import {place}: {type(error).__name__}: {error}") from error
