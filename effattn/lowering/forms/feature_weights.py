"""Trained parameters of feature maps and windows, from a safetensors file.

Tensors are named ``layers.<layer>.<query or key>.<parameter>``, such as ``layers.3.key.weight``, with the shapes in
:data:`~effattn.lowering.forms.feature_maps.FEATURE_MAPS`. Each side has its own number of heads: a key head has one
map, shared by all query heads of its group. With a softmax window, ``layers.<layer>.window.factor`` [query heads]
weighs the window: LoLCATs' ``window_factors``, before their sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effattn.lowering.forms.feature_maps import FEATURE_MAPS
from effattn.lowering.forms.tensor_file import TensorFile

SIDES = ("query", "key")


@dataclass(frozen=True)
class LayerWeights:
    """The parameters of one layer, by name."""

    query: dict[str, Tensor]
    key: dict[str, Tensor]
    gamma: Tensor | None = None  # weight of the window, after the sigmoid: float32 [query heads]


def load_layer(
    path: str | Path,
    feature_map: str,
    layer: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: bool = False,
) -> LayerWeights:
    """The parameters of one layer, on the CPU in the file's dtype; with ``window`` also gamma.

    Raises:
        WeightsError: the file cannot be read, or a tensor is missing, has the wrong shape or dtype, or is not finite.
            The message names the file and the tensor.
    """
    chosen = FEATURE_MAPS[feature_map]
    tensors, owner = TensorFile(path), f"the map {feature_map!r}"
    sides: dict[str, dict[str, Tensor]] = {}
    for side, count in zip(SIDES, (heads, kv_heads), strict=True):
        shapes = chosen.shapes(count, head_dim)
        sides[side] = {
            name: tensors.get(f"layers.{layer}.{side}.{name}", shape, owner) for name, shape in shapes.items()
        }
    gamma = None
    if window:
        gamma = torch.sigmoid(tensors.get(f"layers.{layer}.window.factor", (heads,), "the window").float())
    return LayerWeights(sides["query"], sides["key"], gamma)
