"""Linear: phi(q) . phi(k) replaces exp(q . k), so that a state of fixed size holds the past. There is no softmax, or
only one over a window of the last keys (LoLCATs, arXiv 2410.10254).

Unless the window holds every key, it is not the function that the model was trained with. So it needs trained
weights, or a policy that declares the error it accepts.
"""

from __future__ import annotations

from typing import ClassVar

import sympy
import torch
from pydantic import Field, field_validator

from effattn.ir import expr
from effattn.ir.expr import Nk, Nq
from effattn.ir.refusal import Why
from effattn.ir.site import Site
from effattn.lowering.cost import Cost, Work
from effattn.lowering.forms.feature_maps import FEATURE_MAPS
from effattn.lowering.forms.form import FROM_THE_START, NO_DROPOUT, PLAIN_SCORE, PREFILL, Form, Params, Rule

SCORE_BYTES = 24  # bytes moved per score in a window: float32, written and read by product, mask, exp and product
CHUNK = 64  # tokens per chunk, for costs


class LinearParams(Params):
    """The feature map, its weights, and the error accepted without weights."""

    feature_map: str = Field(default="elu_plus_one", description=f"one of {', '.join(FEATURE_MAPS)}")
    files: ClassVar[tuple[str, ...]] = ("weights",)
    weights: str = Field(default="", description="safetensors file with trained parameters of the map, by layer")
    tolerance: float = Field(
        default=0.0,
        ge=0,
        description="without weights: the relative error of the output that you accept. It is a declaration, not "
        "checked when compiling; expect about 1",
    )
    eps: float = Field(default=1e-6, ge=0, description="added to the sum of a query's weights, without a window")
    window: int = Field(default=0, ge=0, le=1024, description="last keys of each query that get a softmax; 0: none")
    terraced: bool = Field(
        default=False,
        description="the window begins with the block of ``window`` keys before the query's own (LoLCATs' fast path)",
    )
    gamma: float = Field(
        default=0.1, gt=0, lt=1, description="without weights: the weight of the greatest score in the window"
    )

    @field_validator("feature_map")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FEATURE_MAPS:
            raise ValueError(f"unknown feature map {name!r}; there are {', '.join(FEATURE_MAPS)}")
        return name


class LinearForm(Form):
    """The form with its own cost, linear in the length."""

    def cost(self, site: Site, params: Params) -> Cost:
        """Pairs inside chunks, and states between chunks. See :class:`Form`."""
        assert isinstance(params, LinearParams)
        sizes = site.hints
        features = FEATURE_MAPS[params.feature_map].features(sizes.head_dim)
        heads = sizes.batch * sizes.heads
        flops = heads * Nq * (2 * CHUNK * (features + sizes.value_dim) + 4 * features * sizes.value_dim)
        element = 4 if site.dtype == "float32" else 2
        kv = sizes.batch * sizes.kv_heads * (features + sizes.value_dim) * Nk
        moved = element * (heads * (features + sizes.value_dim) * Nq + 2 * kv)
        launches = 3
        if params.window:
            flops += heads * Nq * 4 * params.window * (sizes.head_dim + sizes.value_dim)
            moved += heads * Nq * SCORE_BYTES * 2 * params.window
            launches += 20
        return Cost(Work(flops, moved, launches))


def reference(_params, q_index, k_index):
    """Every key has a weight: bool [Nq, Nk]. ``runtime.reference.linear`` computes the weights."""
    return torch.ones(torch.broadcast_shapes(q_index.shape, k_index.shape), dtype=torch.bool, device=q_index.device)


def _accepted(_site: Site, params: LinearParams) -> bool:
    return bool(params.weights) or params.tolerance > 0


def _has_weights(_site: Site, params: LinearParams) -> bool:
    return bool(params.weights) or not FEATURE_MAPS[params.feature_map].trained


def _known_layer(site: Site, params: LinearParams) -> bool:
    return site.layer is not None or not params.weights


def _causal_window(site: Site, params: LinearParams) -> bool:
    return params.window == 0 or site.spec.predicate != sympy.true


def _plain_window(site: Site, params: LinearParams) -> bool:
    return params.window == 0 or expr.plain_scale(site.spec.score) is not None


def _from_the_first_key(site: Site, _params: LinearParams) -> bool:
    causal = site.spec.predicate == sympy.Le(expr.k, expr.q)
    return site.spec.predicate == sympy.true or (causal and sympy.expand(site.layout.q_len - site.layout.k_len) == 0)


ACCEPTED = Rule(
    Why.NOT_ACCEPTED,
    _accepted,
    "without a softmax this is not the function that the model was trained with. Without training it is unusable: "
    "Llama-3-8B's perplexity is then 1,539 (T2R) or 2,448 (Hedgehog); 79 or 61 with trained maps, 4.11 or "
    "3.90 with LoRA as well, and MMLU still falls from 66.6 to 24.2 (LoLCATs, arXiv 2410.10254)",
    "set params.linear.weights to a file of trained maps, or params.linear.tolerance to the error you accept",
)
TRAINED = Rule(
    Why.TRAINED_MAP,
    _has_weights,
    "this feature map means nothing without trained weights",
    "set params.linear.weights, or use elu_plus_one or relu",
)
LAYER = Rule(
    Why.LAYER,
    _known_layer,
    "the number of the layer is not known, so its weights cannot be found in the file",
    "keep this site exact",
)
CAUSAL_WINDOW = Rule(
    Why.CAUSAL_WINDOW,
    _causal_window,
    "there is no causal mask, so a query has no last keys",
    "set params.linear.window to 0",
)
PLAIN_WINDOW = Rule(
    Why.PLAIN_WINDOW,
    _plain_window,
    "the softmax in the window needs a multiple of query . key, and this score is another function (a soft cap)",
    "keep this site exact, or set params.linear.window to 0",
)
WHOLE = Rule(
    Why.WHOLE,
    _from_the_first_key,
    "the mask is neither empty nor plainly causal from the first key: a state cannot exclude single keys",
    "keep this site exact",
)
SINK = Rule(
    Why.SINK,
    lambda site, params: not site.sink,
    "a sink takes part in the softmax, and there is no softmax",
    "keep this site exact",
)

LINEAR = LinearForm(
    name="linear",
    kind="trained",
    summary="feature maps of query and key instead of a softmax, except in a window: a state of fixed size, O(N)",
    source="Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236",
    params=LinearParams,
    rules=(
        ACCEPTED,
        TRAINED,
        PREFILL,
        WHOLE,
        FROM_THE_START,
        PLAIN_SCORE,
        SINK,
        CAUSAL_WINDOW,
        PLAIN_WINDOW,
        LAYER,
        NO_DROPOUT,
    ),
    kept_keys=lambda params: Nk,
    reference=reference,
    softmax=False,
)
