"""Arguments for the forward of any model: tokens, pictures, sounds, by what its signature asks for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from patches import patched
from shrinking import IMAGE, VOCABULARY
from torch import Tensor, nn

BATCH, LENGTH = 2, 24
SAMPLES = 3200  # of a sound
# names of inputs that say what to compute instead of giving data
LENGTHS = (LENGTH, 7)


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments to try, the likeliest first. The first that an eager forward takes are the model's."""
    asked = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(1)
    quiet = {"use_cache": False} if "use_cache" in asked else {}

    def tokens(length: int) -> Tensor:
        return torch.randint(10, 80, (BATCH, length), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def decoded(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "decoder_input_ids" in asked:
            yield {**given, "decoder_input_ids": tokens(LENGTHS[1])}
        yield given

    def with_tokens(given: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokens(LENGTH), **given} if "input_ids" in asked else given

    yield from patched(model)
    for name in ("pixel_values", "pixel_values_videos"):
        if name not in asked:
            continue
        for size in _sizes(config):
            for channels in _channels(config):
                frames = _first(config, ("num_frames",), 4)
                for picture in (noise(BATCH, channels, size, size), noise(BATCH, frames, channels, size, size)):
                    yield from decoded({**with_tokens({name: picture}), **quiet})
                    yield from decoded({name: picture, **quiet})
    if "input_ids" in asked:
        yield from decoded({"input_ids": tokens(LENGTH), **quiet})
        yield {"input_ids": tokens(64), **quiet}
    if "input_features" in asked:
        bins = _first(
            config,
            (
                "num_mel_bins",
                "n_mels",
                "feature_size",
                "input_dim",
                "input_feat_per_channel",
                "feature_projection_input_dim",
            ),
            16,
        )
        for length in (2 * _first(config, ("max_source_positions",), 64), 64):
            for shape in ((BATCH, bins, length), (BATCH, length, bins)):
                yield from decoded({**with_tokens({"input_features": noise(*shape)}), **quiet})
                yield from decoded({"input_features": noise(*shape), **quiet})
    if "input_values" in asked:
        bins = _first(config, ("num_mel_bins",), 16)
        for shape in ((BATCH, SAMPLES), (BATCH, 1, SAMPLES), (BATCH, _first(config, ("max_length",), 128), bins)):
            yield from decoded({"input_values": noise(*shape), **quiet})
    if "inputs_embeds" in asked:
        yield {"inputs_embeds": noise(BATCH, LENGTH, _first(config, ("hidden_size", "d_model"), 32)), **quiet}
    if "past_values" in asked:
        length = _first(config, ("context_length", "prediction_length"), 32) + max(
            getattr(config, "lags_sequence", [0])
        )
        yield {"past_values": noise(BATCH, length, _first(config, ("num_input_channels",), 1))}
        yield {"past_values": noise(BATCH, length)}
    if "hidden_states" in asked:
        width = _first(config, ("hidden_size", "d_model"), 32)
        yield {"hidden_states": noise(BATCH, LENGTH, width)}
    needed = [name for name, one in asked.items() if one.default is one.empty and one.kind == one.POSITIONAL_OR_KEYWORD]
    if len(needed) == 1 and needed[0] not in ("input_ids", "pixel_values", "input_features", "input_values"):
        for shape in ((BATCH, LENGTH, 32), (BATCH, 3, IMAGE, IMAGE), (BATCH, SAMPLES)):
            yield {needed[0]: noise(*shape)}


def padded(given: dict[str, Any], side: str) -> dict[str, Any] | None:
    """The same with an attention_mask whose first row lacks tokens on one side; None where there are no tokens."""
    if "input_ids" not in given:
        return None
    mask = torch.ones_like(given["input_ids"])
    length = mask.shape[1]
    mask[0, : length // 4 if side == "left" else length] = 0
    if side == "right":
        mask[0, : length - length // 4] = 1
    return {**given, "attention_mask": mask}


def _sizes(config: Any) -> list[int]:
    found = [_first(config, ("image_size", "input_size", "img_size"), IMAGE)]
    return list(dict.fromkeys([*found, IMAGE, 64]))


def _channels(config: Any) -> list[int]:
    return list(dict.fromkeys([_first(config, ("num_channels", "in_channels", "in_chans"), 3), 3]))


def _first(config: Any, names: tuple[str, ...], otherwise: int) -> int:
    """The first of these sizes that the configuration, or one within it, has."""
    inner = [
        getattr(config, name, None) for name in ("vision_config", "audio_config", "text_config", "backbone_config")
    ]
    for one in (config, *inner):
        for name in names:
            value = getattr(one, name, None)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                value = value[0]
            if isinstance(value, int) and value > 0:
                return value
    return otherwise


assert VOCABULARY > 80  # the tokens above are ordinary ones
