"""Attention with a feature map: phi(q) . phi(k) instead of exp(q . k), divided by the sum of a query's weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.lowering.forms.feature_maps import FEATURE_MAPS, NO_PARAMETERS, FeatureMap, Parameters
from effattn.runtime.ops.window_hybrid import window_hybrid

EPS = 1e-6
GAMMA = 0.1


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
    window: int = 0,
    terraced: bool = False,
    gamma: Tensor | float = GAMMA,
    scale: float | None = None,
    layout: str = "bhnd",
    target: str | None = None,
) -> Tensor:
    """Normalised linear attention; with ``window`` a softmax over the last keys, and features only for the keys before.

    Args:
        query: [B, Hq, N, D]; key: [B, Hk, Nk, D]; value: [B, Hk, Nk, Dv], with positions already encoded.
        feature_map: a name in :data:`~effattn.lowering.forms.feature_maps.FEATURE_MAPS`.
        of_query, of_key: parameters of the map for queries and for keys.
        eps: added to the sum of a query's weights, without a window.
        terraced, gamma, scale: of the window, see :func:`~effattn.runtime.ops.window_hybrid.window_hybrid`. ``scale``
            None is 1 / sqrt(D).

    Returns:
        [B, Hq, N, Dv]; 0 for queries without weight on any key. If causal, the last query is at the last key.

    Raises:
        ValueError: a window without causality.
    """
    if window:
        if not causal:
            raise ValueError("a window of keys before each query is causal")
        factor = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
        given = (query, key, value, FEATURE_MAPS[feature_map], of_query, of_key)
        return _with_window(*given, (gamma, window, terraced, factor, layout, target))
    chosen = FEATURE_MAPS[feature_map]
    features = chosen(query, of_query), chosen(key, of_key)
    earlier = key.shape[2] - query.shape[2]
    if causal and earlier != 0:
        return _with_other_lengths(features, value, earlier, eps, layout, target)
    return torch.ops.effattn.linear(
        *features, value, None, None, 1.0, causal, True, eps, layout, target
    )[0]  # fmt: skip


def _with_window(
    query: Tensor, key: Tensor, value: Tensor, phi: FeatureMap, of_query: Parameters, of_key: Parameters, meaning: tuple
) -> Tensor:
    """The window op for any lengths: the last query is at the last key; queries before the first key give 0."""
    earlier = key.shape[2] - query.shape[2]
    rows = query[:, :, max(-earlier, 0) :]
    if earlier > 0:
        rows = F.pad(rows, (0, 0, earlier, 0))
    out = window_hybrid(rows, key, value, phi(rows, of_query), phi(key, of_key), *meaning)
    return out[:, :, earlier:] if earlier >= 0 else F.pad(out, (0, 0, -earlier, 0))


def _with_other_lengths(
    features: tuple[Tensor, Tensor], value: Tensor, earlier: int, eps: float, layout: str, target: str | None
) -> Tensor:
    """Causal attention of the last queries over ``earlier`` more keys; with fewer keys, the first queries see none."""
    query, key = features
    if earlier > 0:
        query = F.pad(query, (0, 0, earlier, 0))
        out = torch.ops.effattn.linear(query, key, value, None, None, 1.0, True, True, eps, layout, target)[0]
        return out[:, :, earlier:]
    query = query[:, :, -earlier:]
    out = torch.ops.effattn.linear(query, key, value, None, None, 1.0, True, True, eps, layout, target)[0]
    return F.pad(out, (0, 0, -earlier, 0))
