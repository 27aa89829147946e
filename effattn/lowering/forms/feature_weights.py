"""Trained parameters of feature maps from a safetensors file, checked before anything is computed with them.

Tensors are named ``layers.<layer>.<query or key>.<parameter>``, as in ``layers.3.key.weight``, with the shapes of
:data:`~effattn.lowering.forms.feature_maps.FEATURE_MAPS`. Heads are those of the side: a key head has one map, which
all query heads of its group share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from effattn.lowering.forms.feature_maps import FEATURE_MAPS
from effattn.lowering.forms.tensor_file import TensorFile

SIDES = ("query", "key")


@dataclass(frozen=True)
class LayerWeights:
    """The parameters of one layer, by name."""

    query: dict[str, Tensor]
    key: dict[str, Tensor]


def load_layer(
    path: str | Path, feature_map: str, layer: int, heads: int, kv_heads: int, head_dim: int
) -> LayerWeights:
    """What the file holds for one layer, on the CPU, in the dtype of the file.

    Raises:
        WeightsError: the file cannot be read, or a tensor is absent, or has another shape or dtype, or is not finite.
            Names the file and the tensor.
    """
    chosen = FEATURE_MAPS[feature_map]
    tensors, owner = TensorFile(path), f"the map {feature_map!r}"
    sides = {}
    for side, count in zip(SIDES, (heads, kv_heads), strict=True):
        shapes = chosen.shapes(count, head_dim)
        sides[side] = {
            name: tensors.get(f"layers.{layer}.{side}.{name}", shape, owner) for name, shape in shapes.items()
        }
    return LayerWeights(**sides)
