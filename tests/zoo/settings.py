"""The ways in which an architecture is called: one row each, with the text that the page shows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from building import Built, NotBuilt, with_head
from inputs import padded
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

STEPS = 4  # of decoding, one token each, after the prefill
NEW_TOKENS = 5
DOCUMENTS = (11, 8, 5)  # lengths of the texts that are packed into one row


@dataclass(frozen=True)
class Call:
    """What is compiled, and what is done with it or with its compiled form; both must return the same."""

    module: nn.Module
    target: Callable[..., Any]  # the module or its forward
    run: Callable[[Callable[..., Any]], Any]


@dataclass(frozen=True)
class Setting:
    """``prepare`` raises NotBuilt, with the reason, where it makes no sense for an architecture."""

    name: str
    text: str
    prepare: Callable[[Built], Call]


def whole(built: Built) -> Call:
    return _forward(built, built.given)


def left(built: Built) -> Call:
    return _padding(built, "left")


def right(built: Built) -> Call:
    return _padding(built, "right")


def documents(built: Built) -> Call:
    """Texts packed into one row: only position_ids, which begin again, tell where one ends."""
    asked = _asked(built)
    _require_tokens(built)
    if _has_encoder(built) or not _cache_name(asked):
        raise NotBuilt("it is no decoder of text")
    if "position_ids" not in asked:
        raise NotBuilt("its forward takes no position_ids")
    tokens = _tokens(1, sum(DOCUMENTS))
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    quiet = {"use_cache": False} if "use_cache" in asked else {}
    return _forward(built, {"input_ids": tokens, "position_ids": positions, **quiet})


def dynamic_cache(built: Built) -> Call:
    config = built.model.config

    def caches(_: int) -> Any:
        if _has_encoder(built):
            return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        return DynamicCache(config=config)

    return _decoding(built, caches)


def static_cache(built: Built) -> Call:
    config, most = built.model.config, 32

    def caches(encoded: int) -> Any:
        if _has_encoder(built):
            return EncoderDecoderCache(StaticCache(config, most), StaticCache(config, encoded))
        return StaticCache(config, most)

    return _decoding(built, caches)


def generate(built: Built) -> Call:
    """Greedy decoding by transformers itself, of two rows of which one is padded on the left."""
    _require_tokens(built)
    model = with_head(built)
    given = padded({"input_ids": _tokens(2, 24)}, "left")
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if _has_encoder(built):
        greedy["decoder_start_token_id"] = 0

    def run(forward: Callable[..., Any]) -> Any:
        model.forward = forward
        try:
            found = model.generate(**given, **greedy)
        finally:
            del model.forward
        return [found.sequences, *found.logits]

    return Call(model, model.forward, run)


SETTINGS = {
    one.name: one
    for one in (
        Setting("whole", "a forward without a cache and without padding", whole),
        Setting("left", "the same with left padding", left),
        Setting("right", "the same with right padding", right),
        Setting("documents", "documents packed into one row, separated only by position_ids", documents),
        Setting("dynamic cache", f"a prefill into a DynamicCache and {STEPS} steps of decoding", dynamic_cache),
        Setting("static cache", f"a prefill into a StaticCache and {STEPS} steps of decoding", static_cache),
        Setting("generate", f"`model.generate` of {NEW_TOKENS} tokens with a compiled forward", generate),
    )
}


def _forward(built: Built, given: dict[str, Any]) -> Call:
    return Call(built.model, built.model, lambda forward: forward(**given))


def _padding(built: Built, side: str) -> Call:
    given = padded(built.given, side)
    if given is None:
        raise NotBuilt("it has no tokens that could be padding")
    return _forward(built, given)


def _decoding(built: Built, caches: Callable[[int], Any]) -> Call:
    """A prefill and steps of one token, with a cache from ``caches(tokens that the encoder reads)``."""
    _require_tokens(built)
    name = _cache_name(_asked(built))
    if not name:
        raise NotBuilt("its forward takes no cache")
    two = _has_encoder(built)
    length, tokens = 12, "decoder_input_ids" if two else "input_ids"
    text = _tokens(2, length + STEPS)
    read = {"input_ids": built.given["input_ids"]} if two else {}

    def run(forward: Callable[..., Any]) -> Any:
        cache = caches(read["input_ids"].shape[1] if two else 0)
        held = {name: cache, "use_cache": True}
        first = forward(**read, **{tokens: text[:, :length]}, **held)
        if not cache.get_seq_length():
            raise NotBuilt("its forward leaves the cache empty")
        encoded = {"encoder_outputs": (first.encoder_last_hidden_state,)} if two else {}
        later = [
            forward(**encoded, **{tokens: text[:, at : at + 1]}, **held)[0] for at in range(length, length + STEPS)
        ]
        return [first[0], *later]

    return Call(built.model, built.model, run)


def _has_encoder(built: Built) -> bool:
    return bool(getattr(built.model.config, "is_encoder_decoder", False))


def _asked(built: Built) -> set[str]:
    return set(inspect.signature(built.model.forward).parameters)


def _cache_name(asked: set[str]) -> str:
    """The parameter that takes a cache: its name depends on the version of transformers."""
    return next((name for name in ("cache", "past_key_values") if name in asked), "")


def _require_tokens(built: Built) -> None:
    if "input_ids" not in built.given:
        raise NotBuilt("it reads no text")


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(10, 80, (batch, length), generator=torch.Generator().manual_seed(2))
