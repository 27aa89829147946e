"""Longer contexts than a model was trained for, by transformers' scaling of rotary embeddings."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effattn.errors import EvaluationError
from effattn.policy.problems import unknown

KINDS = ("yarn", "dynamic", "linear")


@dataclass(frozen=True)
class RopeScaling:
    """``yarn:16``: sixteen times the positions, by transformers' rule "yarn"."""

    kind: str
    factor: float

    @staticmethod
    def read(text: str) -> RopeScaling:
        """Parse ``kind:factor``, or a factor alone for yarn.

        Raises:
            EvaluationError: another format, an unknown kind, or a factor not above 1.
        """
        kind, _, number = text.rpartition(":")
        kind = kind or KINDS[0]
        if kind not in KINDS:
            raise EvaluationError(unknown("kind of RoPE scaling", kind, KINDS))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not 1 < factor < math.inf:
            raise EvaluationError(f"RoPE scaling takes a factor above 1, as in yarn:16, got {text!r}")
        return RopeScaling(kind, factor)

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor:g}"


def context_of(model: Any, scaling: RopeScaling | None = None) -> int | None:
    """The model's maximum number of positions, scaled; None if its configuration does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    return int(limit * scaling.factor) if scaling is not None else limit


@contextlib.contextmanager
def scaled(model: Any, scaling: RopeScaling | None) -> Iterator[None]:
    """Scale the rotary embeddings of ``model`` inside the context, and restore them on exit.

    Raises:
        EvaluationError: the model has no rotary embeddings that transformers can scale.
    """
    if scaling is None:
        yield
        return
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "inv_freq") and hasattr(child, "config")
    ]
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None)
    if not places or not isinstance(parameters, dict) or "rope_theta" not in parameters:
        raise EvaluationError(
            f"{type(model).__name__} has no rotary embeddings that transformers can scale; leave out the RoPE scaling "
            "and keep to the model's own context"
        )
    try:
        for parent, name, child in places:
            setattr(parent, name, _scaled(child, scaling))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _scaled(module: Any, scaling: RopeScaling) -> Any:
    """The same rotary embedding with scaling."""
    config = copy.deepcopy(module.config)
    original = config.max_position_embeddings
    config.rope_parameters = {**config.rope_parameters, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":  # the other kinds use the configuration's own maximum
        config.rope_parameters["original_max_position_embeddings"] = original
        config.max_position_embeddings = int(original * scaling.factor)
    return type(module)(config=config).to(module.inv_freq.device)
