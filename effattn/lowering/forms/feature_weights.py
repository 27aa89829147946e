"""Trained parameters of feature maps and windows from a safetensors file, checked before they are computed with.

Tensors are named ``layers.<layer>.<query or key>.<parameter>``, as in ``layers.3.key.weight``, with the shapes of
:data:`~effattn.lowering.forms.feature_maps.FEATURE_MAPS`. Heads are those of the side: a key head has one map, which
all query heads of its group share. Where a softmax in a window stands beside the map, ``layers.<layer>.window.factor``
[query heads] says what its weights are worth: LoLCATs' ``window_factors``, before their sigmoid.
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
    gamma: Tensor | None = None  # of the window, after the sigmoid: float32 [query heads]


def load_layer(
    path: str | Path,
    feature_map: str,
    layer: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: bool = False,
) -> LayerWeights:
    """What the file holds for one layer, on the CPU, in the dtype of the file; with ``window`` its factor as well.

    Raises:
        WeightsError: the file cannot be read, or a tensor is absent, or has another shape or dtype, or is not finite.
            Names the file and the tensor.
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
