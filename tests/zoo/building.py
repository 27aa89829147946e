"""Build a small random model of an architecture, and find arguments that it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from inputs import candidates
from shrinking import variants
from torch import nn
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from watching import Watch, watched

MOST_PARAMETERS = 30_000_000  # larger ones were not made small by our rules


def names() -> list[str]:
    """Every architecture that transformers has a bare model of."""
    return sorted(MODEL_MAPPING_NAMES)


@dataclass
class Built:
    """A model in eval mode, arguments for its forward, what it returns and how many attentions it ran."""

    model: nn.Module
    given: dict[str, Any]
    expected: Any
    seen: Watch


class NotBuilt(Exception):
    """No small model, or no arguments that it takes; says what was tried."""


@dataclass
class _Tried:
    reasons: list[str] = field(default_factory=list)

    def add(self, error: Exception) -> None:
        lines = str(error).strip().splitlines() or [""]
        self.reasons.append(f"{type(error).__name__}: {lines[0][:160]}")


def build(name: str, attention: str | None = None) -> Built:
    """The architecture called ``name`` (transformers' model_type), with ``attention`` "eager" or "sdpa".

    Raises:
        NotBuilt: it could not be built small, or no arguments were found.
    """
    model, given = with_arguments(name, attention)
    expected, seen = watched(model, given)
    return Built(model, given, expected, seen)


def with_arguments(name: str, attention: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """(model, arguments that its forward takes); see :func:`build`."""
    tried = _Tried()
    for arguments in variants(CONFIG_MAPPING[name]):
        try:
            model = _model(name, arguments, attention)
        except Exception as error:  # a set of sizes that do not fit each other: the next one may
            tried.add(error)
            continue
        for given in candidates(model):
            try:
                with torch.no_grad():
                    model(**given)
            except Exception as error:
                tried.add(error)
                continue
            return model, given
    raise NotBuilt("; ".join(list(dict.fromkeys(tried.reasons))[-3:]) or "no arguments are known for it")


def _model(name: str, arguments: dict[str, Any], attention: str | None) -> nn.Module:
    options = {"attn_implementation": attention} if attention else {}
    config = CONFIG_MAPPING[name](**arguments)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModel.from_config(config, **options).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return AutoModel.from_config(config, **options).eval()
