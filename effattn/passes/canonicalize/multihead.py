"""Decomposes nn.MultiheadAttention and the fused encoder layer.

Dynamo keeps ``F.multi_head_attention_forward`` as one node, including projections. The decomposition computes the same
values: the same projections, masks merged as in the function, SDPA where the function calls SDPA and a plain softmax
where it computes one (``need_weights``), so queries without keys give the same as before.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from effattn.ir.refusal import Why
from effattn.passes.candidate.record import FOUND_AS, Refused
from effattn.passes.graph.autocast import is_autocast
from effattn.passes.graph.insertion import Inserter, difference

KIND = "multi_head_attention"
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_LAYER = inspect.Signature(
    [
        inspect.Parameter(argument.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        for argument in torch.ops.aten._transformer_encoder_layer_fwd.default._schema.arguments
    ]
)
# rare options that add keys or take projected ones; not supported
_EXOTIC = {
    "bias_k": "a bias is added as one more key",
    "bias_v": "a bias is added as one more value",
    "static_k": "projected keys are given",
    "static_v": "projected values are given",
}


# -- F.multi_head_attention_forward -------------------------------------------------------------------------------


def decompose(insert: Inserter, node: fx.Node) -> None:
    """Replace the uses of a ``multi_head_attention_forward`` node by its decomposition.

    Raises:
        Refused: an unsupported option; the reason names it.
    """
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    call = bound.arguments
    outputs = _outputs(node)
    _check(call, outputs, node)
    with as_recorded(node):
        result = _attention(insert, call)
    _replace(outputs, result)


def _check(call: dict[str, Any], outputs: dict[int, fx.Node], node: fx.Node) -> None:
    for name, what in _EXOTIC.items():
        if call[name] is not None:
            raise Refused(Why.MULTI_HEAD_ATTENTION, f"{what} ({name})")
    if call["add_zero_attn"] is not False:
        raise Refused(Why.MULTI_HEAD_ATTENTION, "a key of zeros is added (add_zero_attn)")
    constant = call["training"] is True and isinstance(call["dropout_p"], (int, float))
    if call["training"] is not False and not constant:
        raise Refused(Why.DROPOUT, "attention dropout is decided when the model runs")
    if 1 in outputs and outputs[1].users:
        raise Refused(Why.WEIGHTS, "the attention weights are returned", "call it with need_weights=False")
    if 0 not in outputs:
        raise Refused(Why.OUTPUT, "the output is not used")
    if not all(isinstance(call[name], bool) for name in ("need_weights", "is_causal", "use_separate_proj_weight")):
        raise Refused(Why.ARGUMENTS, "need_weights, is_causal or use_separate_proj_weight is not a constant")
    if not isinstance(call["num_heads"], int) or not isinstance(_value(call["query"]).shape[-1], int):
        raise Refused(Why.ARGUMENTS, "the number of heads or the width is not a constant")
    if any(_value(call[name]).is_nested for name in ("query", "key", "value")):
        raise Refused(Why.ARGUMENTS, "nested tensors")


def _attention(insert: Inserter, call: dict[str, Any]) -> fx.Node:
    """The function's first output: [L, B, E], or [L, E] for inputs without a batch."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    attn_mask, padding = call["attn_mask"], call["key_padding_mask"]
    batched = _value(query).dim() == 3
    if not batched:
        wide = {node: insert.method("unsqueeze", node, 1) for node in dict.fromkeys((query, key, value))}
        query, key, value = wide[query], wide[key], wide[value]
        padding = padding if padding is None else insert.method("unsqueeze", padding, 0)
    heads = call["num_heads"]
    is_causal = call["is_causal"] and padding is None and not call["need_weights"]
    parts = (
        _separate(insert, call, query, key, value)
        if call["use_separate_proj_weight"]
        else _packed(insert, query, key, value, call["in_proj_weight"], call["in_proj_bias"])
    )
    query, key, value = (_heads(insert, part, heads) for part in parts)
    mask = None if is_causal else _merged(insert, attn_mask, padding, heads, _value(query).dtype)
    dropout = call["dropout_p"] if call["training"] else 0.0
    if call["need_weights"]:
        out = _softmax(insert, query, key, value, mask, dropout)
    else:
        out = insert.call(F.scaled_dot_product_attention, query, key, value, mask, dropout, is_causal)
        out.meta[FOUND_AS] = KIND
    joined = insert.method("flatten", insert.method("permute", out, 2, 0, 1, 3), 2)
    result = insert.call(F.linear, joined, call["out_proj_weight"], call["out_proj_bias"])
    return result if batched else insert.method("squeeze", result, 1)


def _packed(insert: Inserter, query, key, value, weight, bias) -> list[fx.Node]:
    """The three projections by ``weight`` [3E, E]; inputs that are one tensor are projected together."""
    width = _value(query).shape[-1]
    if query is key is value:
        return _chunks(insert, insert.call(F.linear, query, weight, bias), 3, -1)
    if key is value:
        sizes = [width, 2 * width]
        weights = _pieces(insert, insert.call(torch.split, weight, sizes), 2)
        biases = [None, None] if bias is None else _pieces(insert, insert.call(torch.split, bias, sizes), 2)
        both = insert.call(F.linear, key, weights[1], biases[1])
        return [insert.call(F.linear, query, weights[0], biases[0]), *_chunks(insert, both, 2, -1)]
    weights = _chunks(insert, weight, 3, 0)
    biases = [None] * 3 if bias is None else _chunks(insert, bias, 3, 0)
    inputs = zip((query, key, value), weights, biases, strict=True)
    return [insert.call(F.linear, x, w, b) for x, w, b in inputs]


def _separate(insert: Inserter, call: dict[str, Any], query, key, value) -> list[fx.Node]:
    bias = call["in_proj_bias"]
    biases = [None] * 3 if bias is None else _chunks(insert, bias, 3, 0)
    weights = [call[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    inputs = zip((query, key, value), weights, biases, strict=True)
    return [insert.call(F.linear, x, w, b) for x, w, b in inputs]


def _heads(insert: Inserter, projected: fx.Node, heads: int) -> fx.Node:
    """[N, B, E] to [B, heads, N, E / heads]."""
    width = _value(projected).shape[-1]
    return insert.method("permute", insert.method("unflatten", projected, -1, (heads, width // heads)), 1, 2, 0, 3)


def _merged(insert: Inserter, attn_mask, padding, heads: int, dtype: torch.dtype) -> fx.Node | None:
    """Both masks as one for SDPA, which broadcasts to [B, heads, L, S].

    The function's boolean masks are True where a key is masked, those of SDPA where it is allowed.
    """
    masks = []
    if attn_mask is not None:
        stacked = _value(attn_mask).dim() == 3  # [B * heads, L, S]
        masks.append(insert.method("unflatten", attn_mask, 0, (-1, heads)) if stacked else attn_mask)
    if padding is not None:
        masks.append(insert.call(operator.getitem, padding, (slice(None), None, None, slice(None))))
    if not masks:
        return None
    if all(_value(mask).dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else insert.call(torch.logical_or, *masks)
        return insert.call(torch.logical_not, hidden)
    added = [mask if _value(mask).is_floating_point() else _as_floats(insert, mask, dtype) for mask in masks]
    return added[0] if len(added) == 1 else insert.call(operator.add, *added)


def _as_floats(insert: Inserter, hidden: fx.Node, dtype: torch.dtype) -> fx.Node:
    zeros = insert.call(torch.zeros_like, hidden, dtype=dtype)
    return insert.method("masked_fill", zeros, hidden, -math.inf)


def _softmax(insert: Inserter, query, key, value, mask: fx.Node | None, dropout: float = 0.0) -> fx.Node:
    """Attention as the function computes it when it returns weights: a query without keys gives NaN."""
    scale = math.sqrt(1.0 / _value(query).shape[-1])
    turned = insert.method("transpose", key, -2, -1)
    scores = insert.call(torch.matmul, insert.call(operator.mul, query, scale), turned)
    if mask is not None:
        if _value(mask).dtype == torch.bool:
            scores = insert.method("masked_fill", scores, insert.call(torch.logical_not, mask), -math.inf)
        else:
            scores = insert.call(operator.add, scores, mask)
    weights = insert.call(F.softmax, scores, dim=-1)
    weights.meta[FOUND_AS] = KIND
    weights = insert.call(F.dropout, weights, dropout) if dropout else weights
    return insert.call(torch.matmul, weights, value)


# -- the fused encoder layer ------------------------------------------------------------------------------------


def decompose_encoder_layer(insert: Inserter, node: fx.Node) -> None:
    """Replace ``torch._transformer_encoder_layer_fwd``, the inference path of nn.TransformerEncoderLayer.

    Its masks, also floating-point ones, mask where they are not zero; a query without keys gives NaN.

    Raises:
        Refused: its inputs are not plain tensors, or autocast is on.
    """
    bound = _LAYER.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    call = bound.arguments
    if is_autocast(node, _value(call["src"]).device):  # the recorded fake value then has the wrong dtype
        raise Refused(
            Why.DTYPE,
            "the fused encoder layer runs under autocast, where it rounds differently from its parts",
            "call torch.backends.mha.set_fastpath_enabled(False), so that the layer runs as its parts",
        )
    if _value(call["src"]).is_nested or _value(call["src"]).dim() != 3:
        raise Refused(Why.ARGUMENTS, "nested tensors")
    if call["mask"] is not None and call["mask_type"] not in (0, 1, 2):
        raise Refused(Why.ARGUMENTS, f"mask type {call['mask_type']!r} of the fused encoder layer is not known")
    with as_recorded(node):
        result = _encoder_layer(insert, call)
    _replace({0: node}, result)


def _encoder_layer(insert: Inserter, call: dict[str, Any]) -> fx.Node:
    """[B, N, E] to [B, N, E]."""

    def norm(x: fx.Node, number: int) -> fx.Node:
        weight, bias = call[f"norm_weight_{number}"], call[f"norm_bias_{number}"]
        return insert.call(F.layer_norm, x, (call["embed_dim"],), weight, bias, call["eps"])

    def attention(x: fx.Node) -> fx.Node:
        parts = _chunks(insert, insert.call(F.linear, x, call["qkv_weight"], call["qkv_bias"]), 3, -1)
        size = (call["num_heads"], call["embed_dim"] // call["num_heads"])
        split = [insert.method("unflatten", part, -1, size) for part in parts]
        query, key, value = (insert.method("transpose", part, 1, 2) for part in split)
        if call["mask"] is None:
            out = insert.call(F.scaled_dot_product_attention, query, key, value)
            out.meta[FOUND_AS] = KIND
        else:
            out = _softmax(insert, query, key, value, _seen(insert, call["mask"], call["mask_type"]))
        joined = insert.method("flatten", insert.method("transpose", out, 1, 2), 2)
        return insert.call(F.linear, joined, call["proj_weight"], call["proj_bias"])

    def feed_forward(x: fx.Node) -> fx.Node:
        inner = insert.call(F.linear, x, call["ffn_weight_1"], call["ffn_bias_1"])
        inner = insert.call(F.gelu if call["use_gelu"] else F.relu, inner)
        return insert.call(F.linear, inner, call["ffn_weight_2"], call["ffn_bias_2"])

    x = call["src"]
    if call["norm_first"]:
        x = insert.call(operator.add, x, attention(norm(x, 1)))
        return insert.call(operator.add, x, feed_forward(norm(x, 2)))
    x = norm(insert.call(operator.add, x, attention(x)), 1)
    return norm(insert.call(operator.add, x, feed_forward(x)), 2)


def _seen(insert: Inserter, mask: fx.Node, mask_type: int) -> fx.Node:
    """Allowed keys from the layer's mask; type 0: [N, N], 1: padding [B, N], 2: [B, heads, N, N]."""
    seen = insert.call(torch.eq, mask, 0)
    return insert.call(operator.getitem, seen, (slice(None), None, None, slice(None))) if mask_type == 1 else seen


def leave_native(insert: Inserter, node: fx.Node) -> None:
    """Refuse ``torch._native_multi_head_attention``, which Dynamo does not make from nn.MultiheadAttention."""
    raise Refused(Why.FUSED_CALL, "torch._native_multi_head_attention hides its attention", "use nn.MultiheadAttention")


# -- shared -----------------------------------------------------------------------------------------------------


def _value(node: fx.Node) -> torch.Tensor:
    return node.meta["example_value"]


def _pieces(insert: Inserter, split: fx.Node, count: int) -> list[fx.Node]:
    return [insert.call(operator.getitem, split, number) for number in range(count)]


def _chunks(insert: Inserter, node: fx.Node, count: int, dim: int) -> list[fx.Node]:
    return _pieces(insert, insert.call(torch.chunk, node, count, dim), count)


def _outputs(node: fx.Node) -> dict[int, fx.Node]:
    """The users of a node that returns a tuple, by index."""
    found: dict[int, fx.Node] = {}
    for user in node.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int) or user.args[1] in found:
            raise Refused(Why.OUTPUT, f"the outputs are not read by constant index: {user.name}")
        found[user.args[1]] = user
    return found


@contextmanager
def as_recorded(node: fx.Node) -> Iterator[None]:
    """Set grad mode as when Dynamo recorded ``node``, so that inserted fake values are right."""
    value = node.meta["example_value"]
    out = value[0] if isinstance(value, tuple) else value
    with torch.set_grad_enabled(out.requires_grad):
        yield


def _replace(outputs: dict[int, fx.Node], result: fx.Node) -> None:
    if wrong := difference(_value(outputs[0]), _value(result)):
        raise Refused(Why.RESULT, f"its expansion gives {wrong}")
    outputs[0].replace_all_uses_with(result)
