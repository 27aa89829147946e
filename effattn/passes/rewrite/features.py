"""A softmax site as linear attention: inserts feature maps of query and key, with their weights as constants."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource

import effattn.runtime.ops  # noqa: F401  (registers torch.ops.effattn)
from effattn.ir.site import Site
from effattn.lowering.forms.feature_maps import FEATURE_MAPS
from effattn.lowering.forms.linear import LinearParams
from effattn.passes.choose.trained import weights_of


def apply_feature_map(x: Tensor, name: str, names: tuple[str, ...], values: tuple[Tensor, ...]) -> Tensor:
    """phi(x), [B, H, N, D] to [B, H, N, F]; ``names`` are the names of the parameters ``values``."""
    return FEATURE_MAPS[name](x, dict(zip(names, values, strict=True)))


def features_op(
    writer: Any, site: Site, params: LinearParams, operands: list[fx.Node], scale: Any, target: str | None
) -> fx.Node:
    """The op's output, [B, H, N, Dv], from query, key and value. ``scale``: of the softmax in a window, if any."""
    weights = weights_of(site, params)
    mapped = []
    for operand, given in zip(operands[:2], (weights.query, weights.key), strict=True):
        constants = tuple(_constant(writer, value, operand) for value in given.values())
        mapped.append(writer.call(apply_feature_map, operand, params.feature_map, tuple(given), constants))
    if params.window:
        gamma = torch.full((int(site.layout.heads),), params.gamma) if weights.gamma is None else weights.gamma
        shape = (params.window, params.terraced, scale, site.output_layout, target)
        tensors = (*operands, *mapped, _constant(writer, gamma, operands[0]))
        both = writer.call(torch.ops.effattn.window_linear.default, *tensors, *shape)
        return writer.call(operator.getitem, both, 0)
    causal = site.spec.predicate != sympy.true
    meaning = (1.0, causal, True, params.eps, site.output_layout, target)
    both = writer.call(torch.ops.effattn.linear.default, *mapped, operands[2], None, None, *meaning)
    return writer.call(operator.getitem, both, 0)


def _constant(writer: Any, value: Tensor, like: fx.Node) -> fx.Node:
    """A tensor as a buffer of the graph's module."""
    module = writer.graph.owning_module
    name = f"effattn_weights_{sum(1 for _ in module.buffers())}"
    module.register_buffer(name, value.to(like.meta["example_value"].device))
    sources = getattr(module, "_param_name_to_source", None)
    if isinstance(sources, dict):  # AOTAutograd needs a source for each buffer of Dynamo's module
        sources[name] = ConstantSource(name)
    node = writer.graph.get_attr(name)
    node.meta["example_value"] = writer.mode.from_tensor(getattr(module, name))
    return node
