"""A small Llama in SmolLM2's proportions, and how its results are judged."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

DEVICE = "cuda"
VOCABULARY = 499
SIZES = {
    "hidden_size": 576,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
# beyond twice what eager PyTorch errs in the same dtype, this much of the largest value is forgiven
SLACK = {torch.bfloat16: 2**-6, torch.float32: 1e-5}


def build(dtype: torch.dtype) -> LlamaForCausalLM:
    """The same weights every time, apart from their rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attn_implementation="sdpa")
    return LlamaForCausalLM(config).to(DEVICE, dtype).eval()


def exact(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights, in float64."""
    made = LlamaForCausalLM(model.config).to(DEVICE, torch.float64).eval()
    made.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    return made


def compiled(function: Any, **options: Any) -> Any:
    """``function`` compiled in one graph with what is given to the backend; nothing falls back."""
    dynamic = options.pop("dynamic", False)
    return torch.compile(
        function, backend="effattn", fullgraph=True, dynamic=dynamic, options={"strict": True, **options}
    )


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def left_padding(ids: torch.Tensor, padded: int) -> torch.Tensor:
    """An attention_mask whose last sequence lacks its first ``padded`` tokens."""
    mask = torch.ones_like(ids)
    mask[-1, :padded] = 0
    return mask


def assert_as_good(actual: torch.Tensor, eager: torch.Tensor, wanted: torch.Tensor, where: Any = None) -> None:
    """``actual`` errs no more than twice as much as ``eager`` does, both in one dtype; ``where``: what counts."""
    assert actual.dtype == eager.dtype
    assert actual.shape == wanted.shape
    assert actual.isfinite().all()
    counts = torch.ones_like(wanted, dtype=torch.bool) if where is None else where
    errors = [((found.double() - wanted).abs() * counts).max().item() for found in (actual, eager)]
    size = (wanted.abs() * counts).max().item()
    assert errors[0] <= 2 * errors[1] + SLACK[actual.dtype] * size, f"{errors[0]} against eager's {errors[1]} of {size}"
