"""A Llama of 8B shape with few layers and random weights: what the model benchmarks run."""

from __future__ import annotations

import argparse
from typing import Any

import torch

LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 4,
    "vocab_size": 32_000,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}


def shape(options: argparse.Namespace, layers: int | None = None) -> dict[str, int]:
    found = dict(TINY if options.tiny else LARGE)
    return {**found, "num_hidden_layers": layers} if layers else found


def dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.float32 if options.tiny else torch.bfloat16


def setting(options: argparse.Namespace, layers: int | None = None) -> dict[str, Any]:
    """What describes the model in a result."""
    said = {"model": "LlamaForCausalLM, random weights", "attention": "sdpa", "dtype": str(dtype(options))}
    return {**said, **shape(options, layers)}


def model(options: argparse.Namespace, positions: int, layers: int | None = None) -> Any:
    """LlamaForCausalLM in evaluation mode, the same weights every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape(options, layers), max_position_embeddings=positions, attn_implementation="sdpa")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype(options))
    try:
        with torch.device(options.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def tokens(options: argparse.Namespace, batch: int, length: int) -> torch.Tensor:
    """int64 [batch, length], the same every time."""
    size = shape(options)["vocab_size"]
    return torch.randint(0, size, (batch, length), generator=torch.Generator().manual_seed(1)).to(options.device)
