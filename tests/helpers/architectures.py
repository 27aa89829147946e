"""Small random models of transformers' architectures, by name."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 99
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SMALL, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}

CONFIGS: dict[str, dict] = {
    "beit": {**_SMALL, "image_size": 32, "patch_size": 8, "use_relative_position_bias": True},
    "bert": _TEXT,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY},
    "falcon": {**_TEXT, "alibi": True, "new_decoder_architecture": False},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "gpt_neox": _TEXT,
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY},
    "opt": {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi3": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY},
    "swinv2": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "vit": {**_SMALL, "image_size": 32, "patch_size": 8},
}
ENCODERS = {"bert", "distilbert"}
IMAGES = {"beit": 32, "swinv2": 16, "vit": 32}  # their size


def build(name: str, attention: str):
    """A random model in eval mode; the same weights every time."""
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(name, **CONFIGS[name]), attn_implementation=attention).eval()


def llama(attention: str = "sdpa", **changes) -> LlamaForCausalLM:
    """A small Llama with a head, grouped 4/2."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**_GROUPED, "max_position_embeddings": 4096, **changes}, attn_implementation=attention)
    return LlamaForCausalLM(config).eval()


def tokens(batch: int = 2, length: int = 19) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def inputs(name: str, padded: bool) -> dict:
    """Arguments of a forward without a cache; ``padded``: with an attention_mask whose first row has left padding."""
    if name in IMAGES:
        size = IMAGES[name]
        return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))}
    given: dict = {"input_ids": tokens()}
    if name not in ENCODERS:
        given["use_cache"] = False
    if name == "t5":
        given["decoder_input_ids"] = tokens(length=7)
    if padded:
        mask = torch.ones_like(given["input_ids"])
        mask[0, :4] = 0
        given["attention_mask"] = mask
    return given
