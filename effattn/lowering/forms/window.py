"""Window: each query attends to the last ``window`` keys and the first ``sinks`` keys."""

from __future__ import annotations

import sympy
from pydantic import Field

from effattn.ir.expr import Nk, k
from effattn.ir.site import Site
from effattn.lowering.forms.form import (
    CAUSAL,
    FROM_THE_FIRST_KEY,
    SINKS_ON_PADDING,
    Form,
    Params,
    is_sink,
)


class WindowParams(Params):
    """Lengths in tokens. Equals exact attention at ``window`` >= Nk."""

    window: int = Field(default=2048, ge=1, description="keys up to and including the query's own position")
    sinks: int = Field(default=128, ge=0, description="first keys, which every query sees")


def keep(params: WindowParams, site: Site):
    return sympy.Or(site.position - k < params.window, is_sink(params.sinks, site))


def reference(params: WindowParams, q_index, k_index):
    """bool [Nq, Nk]; indices are absolute positions, q_index [Nq, 1] and k_index [1, Nk]."""
    return (k_index > q_index - params.window) | (k_index < params.sinks)


WINDOW = Form(
    name="window",
    kind="approximate",
    summary="sliding window with sinks: recent keys and the first few",
    source="Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
    params=WindowParams,
    rules=(CAUSAL, FROM_THE_FIRST_KEY, SINKS_ON_PADDING),
    keep=keep,
    kept_keys=lambda params: sympy.Min(Nk, params.window + params.sinks),
    reference=reference,
)
