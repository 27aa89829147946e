"""Options of ``torch.compile(model, backend="effattn", options={...})``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from effattn.errors import OptionError
from effattn.policy import Policy
from effattn.runtime.targets.choice import TARGETS

_CHOICES: dict[str, tuple] = {
    "inner_backend": ("inductor", "eager"),
    "mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", None),
    "strict": (True, False),
    "verify": (True, False),
    "trace": (True, False),
}


_EARLIER_NAMES = {"rest": "inner_backend"}  # still accepted


@dataclass(frozen=True)
class Options:
    """Options of one compilation."""

    policy: Policy
    inner_backend: str = "inductor"  # what compiles the rest of the graph
    strict: bool = False  # raise instead of falling back
    verify: bool = False  # on every call, also run the original graph and compare
    trace: bool = False  # record how each pass changes the graph, for the report
    mode: str | None = None  # Inductor's mode
    target: str | None = None  # a name in TARGETS, or None: by device

    @staticmethod
    def read(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Options from the arguments of a torch.compile backend.

        Raises:
            OptionError: an unknown name or invalid value; the message says what is allowed and the nearest match.
            PolicyError: the policy is invalid.
        """
        given = dict(options or {})
        for earlier, name in _EARLIER_NAMES.items():
            if earlier in given and name in given:
                raise OptionError(f"option {earlier!r} is the earlier name of {name!r}: give one of them")
            if earlier in given:
                given[name] = given.pop(earlier)
        names = [field.name for field in fields(Options)]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise OptionError(f"unknown option {name!r}; allowed: {', '.join(names)}{hint}")
        if mode is not None and given.get("mode") is None:
            given["mode"] = mode
        for name, allowed in {**_CHOICES, "target": (*TARGETS, None)}.items():
            if name in given and not any(given[name] is value or given[name] == value for value in allowed):
                near = difflib.get_close_matches(str(given[name]), [str(value) for value in allowed], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise OptionError(f"option {name}={given[name]!r}; allowed: {', '.join(map(repr, allowed))}{hint}")
        return Options(**{**given, "policy": Policy.of(given.get("policy"))})
