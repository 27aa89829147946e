"""Trained parameters of feature maps from a safetensors file, checked before anything is computed with them.

Tensors are named ``layers.<layer>.<query or key>.<parameter>``, as in ``layers.3.key.weight``, with the shapes of
:data:`~effattn.lowering.forms.feature_maps.FEATURE_MAPS`. Heads are those of the side: a key head has one map, which
all query heads of its group share.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from effattn.errors import WeightsError
from effattn.lowering.forms.feature_maps import FEATURE_MAPS, FeatureMap

SIDES = ("query", "key")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    tensors = _Tensors(Path(path))
    sides = {}
    for side, count in zip(SIDES, (heads, kv_heads), strict=True):
        shapes = chosen.shapes(count, head_dim)
        sides[side] = {
            name: tensors.get(f"layers.{layer}.{side}.{name}", shape, chosen) for name, shape in shapes.items()
        }
    return LayerWeights(**sides)


class _Tensors:
    """The tensors of one file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise WeightsError(
                f"{path}: reading weights needs the package safetensors; install effattn[models]"
            ) from error
        if not path.is_file():
            raise WeightsError(f"{path}: no such file")
        try:
            self.file = safe_open(path, framework="pt", device="cpu")
            self.names = set(self.file.keys())
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a safetensors file ({error})") from error

    def get(self, name: str, shape: tuple[int, ...], feature_map: FeatureMap) -> Tensor:
        if name not in self.names:
            near = get_close_matches(name, sorted(self.names), 1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise WeightsError(f"{self.path}: no tensor {name!r}, which the map {feature_map.name!r} needs{hint}")
        tensor = self.file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise WeightsError(
                f"{self.path}: {name!r} has shape {list(tensor.shape)}, "
                f"the map {feature_map.name!r} needs {list(shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise WeightsError(f"{self.path}: {name!r} is {tensor.dtype}; allowed are {', '.join(map(str, DTYPES))}")
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{self.path}: {name!r} holds values that are not finite")
        return tensor
