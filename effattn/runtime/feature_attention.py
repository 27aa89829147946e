"""Attention through a feature map: phi(q) . phi(k) for exp(q . k), divided by the sum of the row's weights."""

from __future__ import annotations

import torch
from torch import Tensor

import effattn.runtime.linear  # noqa: F401  (registers the op)
from effattn.lowering.forms.feature_maps import FEATURE_MAPS, NO_PARAMETERS, Parameters

EPS = 1e-6


def feature_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: str,
    of_query: Parameters = NO_PARAMETERS,
    of_key: Parameters = NO_PARAMETERS,
    *,
    causal: bool = True,
    eps: float = EPS,
    layout: str = "bhnd",
    target: str | None = None,
) -> Tensor:
    """Normalised linear attention.

    Args:
        query: [B, Hq, N, D]; key: [B, Hk, Nk, D]; value: [B, Hk, Nk, Dv], with positions already encoded.
        feature_map: a name in :data:`~effattn.lowering.forms.feature_maps.FEATURE_MAPS`.
        of_query, of_key: its parameters for queries and for keys.

    Returns:
        [B, Hq, N, Dv]; 0 where a query has no weight on any key.
    """
    chosen = FEATURE_MAPS[feature_map]
    features = chosen(query, of_query), chosen(key, of_key)
    return torch.ops.effattn.linear(
        *features, value, None, None, 1.0, causal, True, eps, layout, target
    )[0]  # fmt: skip
