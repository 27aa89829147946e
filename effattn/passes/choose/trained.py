"""Trained weights of a form, from a file, for the layer of a site."""

from __future__ import annotations

from typing import Any

from effattn.errors import WeightsError
from effattn.ir.refusal import Refusal, Why
from effattn.ir.site import Site
from effattn.lowering.forms.feature_maps import FEATURE_MAPS
from effattn.lowering.forms.feature_weights import LayerWeights, load_layer
from effattn.lowering.forms.linear import LinearParams


def weights_of(site: Site, params: LinearParams) -> LayerWeights:
    """The weights for the layer of a site; empty for a map without parameters or a form without a file.

    Raises:
        WeightsError: the file does not have the weights that the map needs.
    """
    if not params.weights or not (FEATURE_MAPS[params.feature_map].trained or params.window):
        return LayerWeights({}, {})
    assert site.layer is not None
    layout = site.layout
    sizes = (int(layout.heads), int(layout.kv_heads), int(layout.head_dim))
    return load_layer(params.weights, params.feature_map, site.layer, *sizes, window=params.window > 0)


def no_weights(site: Site, params: Any, min_length: int) -> tuple[Refusal, ...]:
    """Refusals for missing weights, or with ``min_length`` for an unknown length, although the form's rules accept."""
    if min_length and site.layout.fixed_keys is None:
        return (
            Refusal(
                Why.SEVERAL_LENGTHS,
                "a graph of several lengths chooses its form (min_length, auto) in one op, and this form is another",
                "compile a graph for each length, with torch.compile(..., dynamic=False)",
            ),
        )
    try:
        weights_of(site, params)
    except WeightsError as error:
        return (Refusal(Why.MAP_WEIGHTS, str(error)),)
    return ()
