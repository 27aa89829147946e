"""Feature maps of linear attention, one row each: phi(q) . phi(k) replaces exp(q . k).

All features are nonnegative, so a normaliser exists. The two Hedgehogs are different functions; the weights of one do
not fit the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = Mapping[str, Tensor]
NO_PARAMETERS: Parameters = {}


@dataclass(frozen=True)
class FeatureMap:
    """One map phi: [B, H, N, D] -> [B, H, N, features(D)]."""

    name: str
    function: Callable[[Tensor, Parameters], Tensor]  # computes in float32, whatever the model's dtype
    features: Callable[[int], int]  # D -> F
    trained: bool  # has parameters, and is meaningless without trained ones
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]  # (heads, D) -> shape of each parameter of one side
    source: str

    def __call__(self, x: Tensor, parameters: Parameters = NO_PARAMETERS) -> Tensor:
        """phi(x) in the dtype of x: [B, H, N, D] -> [B, H, N, F]."""
        wide = x if x.dtype == torch.float64 else x.float()
        given = {name: value.to(wide.dtype) for name, value in parameters.items()}
        return self.function(wide, given).to(x.dtype)


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, H, N, D] times weight [H, D, F]."""
    return x @ weight


def _t2r(x: Tensor, parameters: Parameters) -> Tensor:
    return F.relu(_per_head(x, parameters["weight"]) + parameters["bias"][:, None, :])


def _hedgehog(x: Tensor, parameters: Parameters) -> Tensor:
    y = _per_head(x, parameters["weight"])
    return torch.cat([torch.softmax(y, dim=-1), torch.softmax(-y, dim=-1)], dim=-1)


def _hedgehog_joint(x: Tensor, parameters: Parameters) -> Tensor:
    y = F.linear(x, parameters["weight"], parameters["bias"])
    return torch.softmax(torch.cat([2 * y, -2 * y], dim=-1), dim=-1)


def _nothing(_heads: int, _dim: int) -> dict[str, tuple[int, ...]]:
    return {}


FEATURE_MAPS: dict[str, FeatureMap] = {
    row.name: row
    for row in (
        FeatureMap(
            "elu_plus_one",
            lambda x, _: F.elu(x) + 1,
            lambda dim: dim,
            False,
            _nothing,
            "Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236, equation 7",
        ),
        FeatureMap("relu", lambda x, _: F.relu(x), lambda dim: dim, False, _nothing, "as in LoLCATs, arXiv 2410.10254"),
        FeatureMap(
            "t2r",
            _t2r,
            lambda dim: dim,
            True,
            lambda heads, dim: {"weight": (heads, dim, dim), "bias": (heads, dim)},
            "Kasai et al., Finetuning Pretrained Transformers into RNNs, arXiv 2103.13076, section 2.2",
        ),
        FeatureMap(
            "hedgehog",
            _hedgehog,
            lambda dim: 2 * (dim // 2),
            True,
            lambda heads, dim: {"weight": (heads, dim, dim // 2)},
            "Zhang et al., Hedgehog, arXiv 2402.04347, as in LoLCATs, arXiv 2410.10254: a softmax of each sign",
        ),
        FeatureMap(
            "hedgehog_joint",
            _hedgehog_joint,
            lambda dim: 2 * dim,
            True,
            lambda heads, dim: {"weight": (dim, dim), "bias": (dim,)},
            "as in flash-linear-attention: one softmax over both signs, one weight for all heads",
        ),
    )
}
