"""Small configurations of any architecture: sizes by the names that transformers' configurations give them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

VOCABULARY = 99
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8
WIDTH, FEED_FORWARD = HEADS * HEAD_DIM, 64
IMAGE, PATCH = 32, 8

# (ways to spell it, value); the first row whose name matches is taken
_EXACT: dict[str, Any] = {}
_ROWS: tuple[tuple[str, Any], ...] = (
    (
        "hidden_size d_model n_embd dim embed_dim embedding_size hidden_dim encoder_hidden_size decoder_hidden_size "
        "hidden_sizes_text word_embed_proj_dim emb_dim d_embed embedding_dim text_hidden_size projection_dim "
        "vision_hidden_size out_hidden_size d_encoder attention_hidden_size qk_hidden_size hidden_act_size "
        "lm_hidden_size audio_hidden_size conv_dim_text d_hidden decoder_d_model model_dim num_hiddens rnn_hidden_size",
        WIDTH,
    ),
    (
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner d_inner dim_feedforward "
        "ffn_hidden_size "
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mlp_dim intermediate_dim "
        "encoder_intermediate_size decoder_intermediate_size feedforward_size moe_shared_expert_intermediate_size "
        "mlp_hidden_size dense_intermediate_size shared_intermediate_size intermediate_size_mlp",
        FEED_FORWARD,
    ),
    (
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers depth encoder_num_hidden_layers decoder_num_hidden_layers num_transformer_layers "
        "num_blocks vision_layers e_layers d_layers num_attention_layers num_block_layers text_encoder_layers "
        "decoder_num_layers encoder_num_layers num_encoder_blocks_text",
        LAYERS,
    ),
    (
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "encoder_num_attention_heads decoder_num_attention_heads attention_heads num_query_heads nhead "
        "encoder_num_heads decoder_num_heads num_attention_heads_text",
        HEADS,
    ),
    ("num_key_value_heads num_kv_heads n_head_kv multi_query_group_num encoder_num_key_value_heads "
     "decoder_num_key_value_heads", KV_HEADS),
    ("head_dim d_kv attention_head_dim attention_head_size kv_channels d_head v_head_dim qk_nope_head_dim "
     "qk_rope_head_dim head_dim_text global_head_dim", HEAD_DIM),
    ("vocab_size text_vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size char_vocab_size "
     "vocab_size_per_layer_input", VOCABULARY),
    ("num_kv_shared_layers", 0),
    ("rotary_dim", HEAD_DIM),
    ("prediction_length", 12),
    ("hidden_size_per_layer_input", 16),
    ("q_lora_rank kv_lora_rank o_lora_rank", 16),
    ("num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts", 4),
    ("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts", 2),
    ("n_group num_expert_group topk_group n_groups", 1),
    ("image_size input_size", IMAGE),
    ("patch_size", PATCH),
    ("max_source_positions max_target_positions max_positions n_positions max_position_embeddings n_ctx max_seq_len",
     512),
    ("num_mel_bins", 16),
    ("type_vocab_size", 2),
    ("mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim n_mamba_heads mamba_headdim", 8),
    ("num_queries", 10),
    ("sliding_window attention_window attention_window_size window_size_text local_attention", 8),
)  # fmt: skip
for _names, _value in _ROWS:
    _EXACT.update(dict.fromkeys(_names.split(), _value))

# what a hierarchy of stages has a list of: at most two stages, small
_LISTS = {
    "depths": [1, 1], "num_heads": [2, 4], "hidden_sizes": [16, 32], "embed_dims": [16, 32], "layers": [1, 1],
    "num_attention_heads": [2, 4], "sr_ratios": [2, 1], "window_size": 4, "out_features": None, "out_indices": None,
    "stage_names": None,
}  # fmt: skip
_KEPT_TOKENS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "sep_token_id",
    "cls_token_id",
)


# a model whose layers are of several kinds, and has one attention in four layers, would have none in two
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LAYERS_OF: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bamba": {"attn_layer_indices": [1]},
    "zamba": {"num_hidden_layers": 10, "attention_hidden_size": 64, "attention_head_dim": 16},  # two share weights
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
}
NAMED, ENOUGH, FEW = "one layer of each kind", "layers until every kind has come", "the first two layers"


def variants(config_class: type[PretrainedConfig]) -> Iterator[dict[str, Any]]:
    """Arguments for the class, the likeliest first: some sizes depend on others in ways that only trying tells."""
    seen: list[dict[str, Any]] = []
    for layers in (NAMED, ENOUGH, FEW):
        plain = _arguments(config_class, layers)
        if plain not in seen:
            seen.append(plain)
            yield from _around(plain)


def _around(plain: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same sizes, and with fewer of them given."""
    yield plain
    yield {
        name: value for name, value in plain.items() if name not in ("head_dim", "attention_head_dim", "kv_channels")
    }
    yield _without_groups(plain)
    few = (
        "layers",
        "layer",
        "depth",
        "vocab",
        "hidden_size",
        "d_model",
        "heads",
        "intermediate",
        "token_id",
        "_config",
    )
    yield {name: value for name, value in plain.items() if any(part in name for part in few)}
    yield {name: value for name, value in plain.items() if any(part in name for part in ("layers", "layer", "_config"))}


def _without_groups(sizes: dict[str, Any]) -> dict[str, Any]:
    """As many key/value heads as query heads, in the parts of a configuration as well."""
    found = dict(sizes)
    for name, value in sizes.items():
        if isinstance(value, dict):
            found[name] = _without_groups(value)
        elif "key_value_heads" in name or name == "num_kv_heads":
            found[name] = HEADS
    return found


def _arguments(config_class: type[PretrainedConfig], layers: str) -> dict[str, Any]:
    """A value for every parameter of the class that is a size; ``layers`` is how kinds of layers are chosen."""
    defaults = _defaults(config_class)
    found: dict[str, Any] = {}
    for name, default in defaults.items():
        if name in (getattr(config_class, "sub_configs", None) or {}):
            continue
        value = _value(name, default)
        if value is not _UNCHANGED:
            found[name] = value
    found |= _kinds_of_layers(config_class, defaults, found, layers)
    found |= _rotated_axes(config_class, defaults)
    for name, sub_class in _parts(config_class).items():
        found[name] = {**_arguments(sub_class, layers), "model_type": sub_class.model_type}
    return found


def _kinds_of_layers(
    config_class: type[PretrainedConfig], defaults: dict[str, Any], sizes: dict[str, Any], layers: str
) -> dict[str, Any]:
    """Arguments with which each kind of layer that the architecture has by default occurs in the small model too."""
    if layers == NAMED and config_class.model_type in _LAYERS_OF:
        return _LAYERS_OF[config_class.model_type]
    kinds = _default_kinds(config_class)
    distinct = list(dict.fromkeys(kinds))
    last = max((kinds.index(kind) for kind in distinct), default=0)
    counts = [name for name in _LAYER_COUNTS if name in sizes]
    if last < LAYERS:
        return {}
    if layers == NAMED and "layer_types" in defaults:
        return {"layer_types": distinct, **dict.fromkeys(counts, len(distinct))}
    return {} if layers == FEW else dict.fromkeys(counts, last + 1)


def _rotated_axes(config_class: type[PretrainedConfig], defaults: dict[str, Any]) -> dict[str, Any]:
    """Rotations by frame, row and column share a head's pairs: as many of each as a small head has room for."""
    if "mrope_section" not in getattr(config_class, "ignore_keys_at_rope_validation", ()):
        return {}
    default = getattr(config_class, "default_theta", 10000.0)
    share = getattr(config_class, "default_partial_rotary_factor", None) or defaults.get("partial_rotary_factor") or 1.0
    pairs = int(HEAD_DIM * share) // 2
    of_each = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": default, "mrope_section": of_each}}


def _default_kinds(config_class: type[PretrainedConfig]) -> list[str]:
    try:
        return [str(kind) for kind in getattr(config_class(), "layer_types", None) or ()]
    except Exception:  # it has no defaults
        return []


def _parts(config_class: type[PretrainedConfig]) -> dict[str, type[PretrainedConfig]]:
    """Configurations within a configuration, of the classes that they have by default."""
    named = getattr(config_class, "sub_configs", None) or {}
    if not named:
        return {}
    try:
        whole = config_class()
    except Exception:  # some have no defaults: then the classes that they name
        return {name: one for name, one in named.items() if getattr(one, "model_type", "")}
    parts = {name: getattr(whole, name, None) for name in named}
    return {name: type(one) for name, one in parts.items() if isinstance(one, PretrainedConfig) and one.model_type}


_UNCHANGED = object()


def _value(name: str, default: Any) -> Any:
    if isinstance(default, (list, tuple)) and name in _LISTS:
        return _LISTS[name] if _LISTS[name] is not None else default
    if name in _EXACT and isinstance(default, int | None) and not isinstance(default, bool):
        return _EXACT[name] if default is None or default > _EXACT[name] or name in _ALWAYS else default
    if name.endswith(("_token_id", "_token_index")):
        if not isinstance(default, int) or default < VOCABULARY:
            return _UNCHANGED
        known = _KEPT_TOKENS.index(name) if name in _KEPT_TOKENS else len(_KEPT_TOKENS)
        return known if name in _KEPT_TOKENS else 90 + sum(map(ord, name)) % 9
    return _UNCHANGED


_ALWAYS = {"num_key_value_heads", "num_attention_heads", "n_head", "num_heads", "hidden_size", "d_model", "head_dim"}


def _defaults(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Parameters of the class and their defaults, those of classes that it extends included."""
    found: dict[str, Any] = {}
    for base in reversed(config_class.__mro__):
        if base in (object, PretrainedConfig) or "__init__" not in vars(base):
            continue
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and name != "self":
                found[name] = None if parameter.default is parameter.empty else parameter.default
    return found
