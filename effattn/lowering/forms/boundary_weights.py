"""Weights of the predictor that cuts keys into chunks (DHSA v1), from a safetensors file.

The layout is effattn's own. Names are those of the class ``BoundarySimilarityAttn`` in the authors' code (github
xiongsiheng/DHSA, ``boundary_predictor/models.py``), prefixed by ``all.`` for one predictor for all layers, or by
``layers.<number>.`` for one per layer. With C = key heads x head_dim and any hidden size M:

    enc.mha.in_proj_weight  [3C, C]     enc.mha.in_proj_bias  [3C]
    enc.mha.out_proj.weight [C, C]      enc.mha.out_proj.bias [C]
    enc.norm.weight         [C]         enc.norm.bias         [C]
    pool.gate.weight        [1, C]      optional: pools windows by learned weights instead of the mean
    mlp.0.weight            [M, 4C + 1] mlp.0.bias            [M]
    mlp.2.weight            [1, M]      mlp.2.bias            [1]

in float32, float16 or bfloat16. Metadata: ``heads``, the number of heads of the predictor's attention (no tensor shows
it; the default of the authors' training script is 4, their scripts that run it use 8), and optionally ``window``, the
tokens on each side (default 4).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from effattn.errors import WeightsError
from effattn.lowering.forms.tensor_file import TensorFile, digest_of

OWNER = "the boundary predictor"
POOL = "pool.gate.weight"
WINDOW = 4
MOST_HEADS, MOST_WINDOW = 1024, 64


@dataclass(frozen=True)
class Predictor:
    """The parameters of one predictor by name, and the sizes that their shapes do not show."""

    tensors: Mapping[str, Tensor]
    heads: int
    window: int


def shapes(channels: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the required tensors, for C ``channels`` and M ``hidden``."""
    return {
        "enc.mha.in_proj_weight": (3 * channels, channels),
        "enc.mha.in_proj_bias": (3 * channels,),
        "enc.mha.out_proj.weight": (channels, channels),
        "enc.mha.out_proj.bias": (channels,),
        "enc.norm.weight": (channels,),
        "enc.norm.bias": (channels,),
        "mlp.0.weight": (hidden, 4 * channels + 1),
        "mlp.0.bias": (hidden,),
        "mlp.2.weight": (1, hidden),
        "mlp.2.bias": (1,),
    }


def load(path: str, digest: str, layer: int | None, kv_heads: int, head_dim: int) -> Predictor:
    """The predictor of a layer, on the CPU in the file's dtypes.

    Raises:
        WeightsError: the file cannot be read, differs from ``digest`` or has nothing for the layer, or a tensor is
            missing, has the wrong shape or dtype, or is not finite. The message names the file and the tensor.
    """
    if digest_of(path) != digest:
        raise WeightsError(
            f"{path}: this is not the file with which the model was compiled (its SHA-256 differs); compile it again"
        )
    file = TensorFile(path)
    prefix = _prefix(file, layer)
    channels = kv_heads * head_dim
    heads = file.whole_number("heads", None, MOST_HEADS, "how many heads the predictor's attention has")
    window = file.whole_number("window", WINDOW, MOST_WINDOW, "how many tokens it sees on each side")
    of_file = file.shape(f"{prefix}enc.norm.weight", OWNER)
    if of_file != (channels,):
        raise WeightsError(
            f"{path}: this predictor is for keys of {' x '.join(map(str, of_file))} numbers, here they have {channels} "
            f"({kv_heads} key heads of {head_dim})"
        )
    if channels % heads:
        raise WeightsError(f"{path}: keys of {channels} numbers do not divide among {heads} heads of the predictor")
    hidden = (*file.shape(f"{prefix}mlp.0.bias", OWNER), 0)[0]
    wanted = shapes(channels, hidden)
    if prefix + POOL in file.names:
        wanted[POOL] = (1, channels)
    return Predictor({name: file.get(prefix + name, shape, OWNER) for name, shape in wanted.items()}, heads, window)


def _prefix(file: TensorFile, layer: int | None) -> str:
    """The prefix of the names of a layer's tensors."""
    numbers = {int(found[1]) for name in file.names if (found := re.match(r"layers\.(\d{1,6})\.", name))}
    if layer in numbers:
        return f"layers.{layer}."
    if any(name.startswith("all.") for name in file.names):
        return "all."
    if not numbers:
        raise WeightsError(
            f"{file.path}: holds no boundary predictor: no name begins with 'all.' or 'layers.<number>.'"
        )
    if layer is None:
        raise WeightsError(
            f"{file.path}: holds a predictor for each layer, and the number of this layer is not known; compile the "
            "whole model, or use a file with one for all of them ('all.')"
        )
    held = ", ".join(map(str, sorted(numbers)[:8])) + (", ..." if len(numbers) > 8 else "")
    raise WeightsError(f"{file.path}: holds no predictor for layer {layer}; there are some for layers {held}")


@lru_cache(maxsize=1024)
def problem(path: str, digest: str, layer: int | None, kv_heads: int, head_dim: int) -> str | None:
    """Why the predictor of a layer cannot be loaded; None if it can."""
    try:
        load(path, digest, layer, kv_heads, head_dim)
    except WeightsError as error:
        return str(error)
    return None


@lru_cache(maxsize=128)
def on_device(
    path: str, digest: str, layer: int | None, kv_heads: int, head_dim: int, device: torch.device
) -> Predictor:
    """The result of :func:`load` in float32 on ``device``, cached. Layers that share a predictor share its memory.

    Raises:
        WeightsError: see :func:`load`.
    """
    if layer is not None and _prefix(TensorFile(path), layer) == "all.":
        return on_device(path, digest, None, kv_heads, head_dim, device)
    found = load(path, digest, layer, kv_heads, head_dim)
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in found.tensors.items()}
    return Predictor(tensors, found.heads, found.window)
