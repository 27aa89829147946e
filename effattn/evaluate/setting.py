"""The arguments of an evaluation, checked before a model runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effattn.errors import EvaluationError
from effattn.evaluate.rope import RopeScaling
from effattn.policy import Policy
from effattn.policy.problems import unknown

TASKS = ("errors", "perplexity", "passkey", "time")
RESTS = ("inductor", "eager")
SHORTEST = 16  # tokens; a single token would be a decode step
DENSE = "dense"  # the uncompiled model

PolicySource = str | os.PathLike | Mapping[str, Any] | Policy


@dataclass(frozen=True)
class Setting:
    """Everything that results depend on, apart from model, text and machine."""

    policies: tuple[Policy, ...]
    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (2048,)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)  # of the passkey: 0 is the start of the text, 1 its end
    trials: int = 5  # passkeys per length and depth
    segments: int = 1  # consecutive texts per length for perplexity
    repeats: int = 2  # timed forwards after the first
    seed: int = 0
    rest: str = "eager"  # what compiles the rest of the graph
    rope: RopeScaling | None = None

    @staticmethod
    def read(policies: Iterable[PolicySource], **given: Any) -> Setting:
        """A checked setting from a user's arguments.

        Raises:
            EvaluationError: a value is invalid; the message says what is allowed and the nearest match.
            PolicyError: a policy is invalid.
        """
        rope = given.pop("rope_scaling", None)
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        setting = Setting(
            tuple(Policy.of(policy) for policy in policies),
            rope=RopeScaling.read(rope) if isinstance(rope, str) else rope,
            **given,
        )
        setting._check()
        return setting

    def _check(self) -> None:
        if not self.policies:
            raise EvaluationError("no policies to evaluate; name at least one, as power")
        names = [policy.name for policy in self.policies]
        for name in names:
            if names.count(name) > 1 or name == DENSE:
                other = "the uncompiled model is" if name == DENSE else "two policies are"
                raise EvaluationError(f"{other} called {name!r}; give each policy file a name of its own")
        _distinct("task", self.tasks)
        for task in self.tasks:
            if task not in TASKS:
                raise EvaluationError(unknown("task", str(task), TASKS))
        _distinct("length", self.lengths)
        for length in self.lengths:
            _at_least(SHORTEST, "a length in tokens", length)
        for depth in self.depths:
            if isinstance(depth, bool) or not isinstance(depth, (int, float)) or not 0 <= depth <= 1:
                raise EvaluationError(f"a depth must be from 0 (start of the text) to 1 (its end), got {depth!r}")
        if "passkey" in self.tasks:
            _distinct("depth", self.depths)
        for what, least in (("trials", 1), ("segments", 1), ("repeats", 0), ("seed", 0)):
            _at_least(least, what, getattr(self, what))
        if self.rest not in RESTS:
            raise EvaluationError(unknown("value of rest", self.rest, RESTS))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(policy.name for policy in self.policies)

    def to_dict(self) -> dict[str, Any]:
        """The setting as JSON values, policies in full."""
        body = {name: value for name, value in vars(self).items() if name not in ("policies", "rope")}
        body = {name: list(value) if isinstance(value, tuple) else value for name, value in body.items()}
        body["rope_scaling"] = None if self.rope is None else str(self.rope)
        return {**body, "policies": [policy.to_dict(json=True) for policy in self.policies]}


def _distinct(what: str, values: Sequence[Any]) -> None:
    if not values:
        raise EvaluationError(f"no {what} given; name at least one")
    for value in values:
        if values.count(value) > 1:
            raise EvaluationError(f"{what} {value!r} is named twice")


def _at_least(least: int, what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise EvaluationError(f"{what} must be a whole number of at least {least}, got {value!r}")
