"""Build a small random model of an architecture, and find arguments that it takes."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from inputs import candidates
from shrinking import variants
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

MOST_PARAMETERS = 40_000_000  # larger ones were not made small by our rules


def names() -> list[str]:
    """Every architecture that transformers has a bare model of, decoders of text first."""
    return sorted(MODEL_MAPPING_NAMES, key=lambda name: (name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, name))


@dataclass
class Built:
    """A small model in eval mode, and arguments that its forward takes."""

    name: str
    sizes: dict[str, Any]  # arguments of its configuration
    attention: str | None
    model: nn.Module
    given: dict[str, Any]


class NotBuilt(Exception):
    """No small model, or no arguments that it takes; says what was tried."""


@dataclass
class _Tried:
    reasons: list[str] = field(default_factory=list)

    def add(self, error: Exception) -> None:
        lines = str(error).strip().splitlines() or [""]
        self.reasons.append(f"{type(error).__name__}: {lines[0][:160]}")


def build(name: str, attention: str | None = None) -> Built:
    """The architecture called ``name`` (transformers' model_type), with ``attention`` as attn_implementation.

    Raises:
        NotBuilt: it could not be built small, or no arguments were found.
    """
    tried = _Tried()
    for sizes in variants(CONFIG_MAPPING[name]):
        try:
            model = _model(AutoModel, name, sizes, attention)
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
            return Built(name, sizes, attention, model, given)
    raise NotBuilt("; ".join(list(dict.fromkeys(tried.reasons))[-3:]) or "no arguments are known for it")


def with_attention(built: Built, attention: str) -> Built:
    """The same model, weights and arguments with another attn_implementation."""
    try:
        model = _model(AutoModel, built.name, built.sizes, attention)
    except Exception as error:
        told = str(error).replace(f"{sysconfig.get_path('purelib')}/", "")  # results name no place of a machine
        raise NotBuilt(f"{type(error).__name__}: {told[:160]}") from error
    model.load_state_dict(built.model.state_dict())
    return replace(built, attention=attention, model=model)


def with_head(built: Built) -> nn.Module:
    """The same sizes as a model that generates text."""
    has_encoder = getattr(built.model.config, "is_encoder_decoder", False)
    for mapping, auto in _HEADS_AFTER_AN_ENCODER if has_encoder else _HEADS:
        if built.name in mapping:
            try:
                return _model(auto, built.name, built.sizes, built.attention)
            except Exception as error:  # some generate only with another setting
                raise NotBuilt(f"its model that generates text: {type(error).__name__}: {error}") from error
    raise NotBuilt("transformers has no model of it that generates text from text")


_HEADS_AFTER_AN_ENCODER = ((MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),)
_HEADS = (
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
)


def _model(auto: Any, name: str, sizes: dict[str, Any], attention: str | None) -> nn.Module:
    options = {"attn_implementation": attention} if attention else {}
    config = CONFIG_MAPPING[name](**sizes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config, **options).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return auto.from_config(config, **options).eval()
