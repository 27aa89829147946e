"""Pictures as rows of patches beside a grid (frames, rows, columns): how Qwen-VL, GLM-V and their kin take them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

GRIDS = (((1, 12, 8), (1, 4, 4)), ((1, 4, 4), (1, 4, 4)))  # of two pictures: windows of attention differ, or not
WORDS = 6  # before a picture, and after it


def patched(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments to try for a vision model whose forward takes a grid, or for a model of text and pictures."""
    asked = inspect.signature(model.forward).parameters
    vision = getattr(model.config, "vision_config", model.config)
    for grids in GRIDS:
        grid = torch.tensor(grids)
        for shape in _shapes(vision):
            rows = _noise(int(grid.prod(dim=1).sum()), *shape)
            if "grid_thw" in asked:
                name = "pixel_values" if "pixel_values" in asked else "hidden_states"
                yield {name: rows, "grid_thw": grid, **_others(asked, vision)}
                yield {name: rows[None], "grid_thw": grid, **_others(asked, vision)}
            elif "image_grid_thw" in asked and grids[0] == grids[1]:
                yield _with_text(model, asked, vision, rows, grid)
                yield _with_text(model, asked, vision, rows[None], grid)
            elif "spatial_shapes" in asked:
                yield from _masked(asked, rows)


def _with_text(model: nn.Module, asked: Any, vision: Any, rows: Tensor, grid: Tensor) -> dict[str, Any]:
    """Two texts with a picture each."""
    config: Any = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", 0)
    merged = int(grid[0].prod()) // _merge(vision) ** 2
    words = torch.arange(10, 10 + 2 * WORDS)
    ids = torch.cat([words[:WORDS], torch.full((merged,), token), words[WORDS:]]).expand(2, -1).clone()
    given = {"input_ids": ids, "pixel_values": rows, "image_grid_thw": grid}
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in asked:
            given[name] = (ids == token).int()
    return given | ({"use_cache": False} if "use_cache" in asked or "past_key_values" in asked else {})


def _masked(asked: Any, rows: Tensor) -> Iterator[dict[str, Any]]:
    """SigLIP 2: pictures of several sizes in rows of one length, the rest hidden by a mask."""
    both = rows[: rows.shape[0] // 2 * 2].reshape(2, -1, *rows.shape[1:])[:, :16]
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 12:] = 0
    given = {"pixel_values": both, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4], [3, 4]])}
    yield given if "input_ids" not in asked else {"input_ids": torch.arange(10, 34).reshape(2, 12), **given}


def _others(asked: Any, vision: Any) -> dict[str, Any]:
    return {"merge_sizes": torch.tensor([_merge(vision)] * 2)} if "merge_sizes" in asked else {}


def _shapes(vision: Any) -> list[tuple[int, ...]]:
    """Shapes of one patch: flat, of all frames that it has or of one, or as a picture."""
    size = getattr(vision, "patch_size", None)
    if not isinstance(size, int):
        return []
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    frames = getattr(vision, "temporal_patch_size", 1)
    flat = (channels * size**2 * frames, channels * size**2, 2 * channels * size**2)
    return [*((width,) for width in dict.fromkeys(flat)), (channels, size, size)]


def _merge(vision: Any) -> int:
    return getattr(vision, "spatial_merge_size", 2) or 1


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))
