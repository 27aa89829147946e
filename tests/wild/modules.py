"""PyTorch's own attention modules, in what tests/passes/canonicalize/test_multihead.py does not ask of them."""

from __future__ import annotations

import torch
from row import Row
from torch import nn

WIDTH, HEADS, N, S = 24, 3, 9, 6
INF = float("inf")


class Attention(nn.Module):
    """nn.MultiheadAttention called with options; its weights are returned where ``weights`` asks for them."""

    def __init__(self, built: dict, called: dict, cross: bool = False, weights: bool = False):
        super().__init__()
        self.inner, self.called, self.cross, self.weights = (
            nn.MultiheadAttention(WIDTH, HEADS, **built),
            called,
            cross,
            weights,
        )

    def forward(self, x, y, *masks):
        y = y if self.cross else x
        names = [name for name in ("attn_mask", "key_padding_mask") if name in self.called]
        more = {**self.called, **dict(zip(names, masks, strict=True))}
        out, weights = self.inner(x, y, y, **more)
        return (out, weights) if self.weights else out


class Stack(nn.Module):
    """An encoder and a decoder, in one of the two modes."""

    def __init__(self, train: bool, **options):
        super().__init__()
        kinds = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True, **options}
        self.inner, self.mode = nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **kinds), train

    def forward(self, x, y, hidden=None):
        self.inner.train(self.mode)
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        return self.inner(
            x, y, tgt_mask=mask, src_key_padding_mask=hidden, memory_key_padding_mask=hidden, tgt_is_causal=True
        )


class Nested(nn.Module):
    """An encoder that turns padded input into nested tensors where it may."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x, hidden):
        return self.inner(x, src_key_padding_mask=hidden)


def inputs(*masks, first: str = "batch"):
    x, y = (2, N, WIDTH), (2, S, WIDTH)
    if first == "time":
        x, y = (N, 2, WIDTH), (S, 2, WIDTH)
    return lambda: (torch.randn(*x), torch.randn(*y), *masks)


def narrow(*masks):
    return lambda: (torch.randn(2, N, 16), torch.randn(2, S, 16), *masks)


def mha(name, called, masks=(), predicate="true", *, built=None, cross=False, weights=False, first="batch", **more):
    built = {"batch_first": first == "batch", **(built or {})}
    return Row(
        lambda: Attention(built, called, cross, weights), inputs(*masks, first=first), predicate, name=name, **more
    )


HIDDEN = torch.arange(N) >= torch.tensor([[9], [5]])
CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)
HEADS_APART = torch.rand(2 * HEADS, N, N, generator=torch.Generator().manual_seed(4)) > 0.7
RETURNED = ("the attention weights are returned",)
NO_WEIGHTS = {"need_weights": False}
ASKED = {"attn_mask": None, "need_weights": False}

ROWS = [
    mha("mha-weights", {"need_weights": True}, (), (), weights=True, missed=RETURNED),
    mha("mha-weights-of-heads", {"average_attn_weights": False}, (), (), weights=True, missed=RETURNED),
    mha("mha-weights-of-heads-unused", {"average_attn_weights": False}),
    mha("mha-time-first", NO_WEIGHTS, first="time"),
    mha("mha-bool", ASKED, (CAUSAL,), "~mask[q, k]"),
    mha("mha-float", ASKED, (torch.where(CAUSAL, -INF, 0.0),), score="bias[q, k]"),
    mha("mha-bool-3d", ASKED, (HEADS_APART,), "~mask[h + 3*b, q, k]"),
    mha("mha-float-3d", ASKED, (torch.where(HEADS_APART, -INF, 0.0),), score="bias"),
    mha("mha-both", {**ASKED, "key_padding_mask": None}, (CAUSAL, HIDDEN), "~mask[q, k] & ~padding[b, k]"),
    mha("mha-bias_kv", NO_WEIGHTS, (), (), built={"add_bias_kv": True}, missed=("bias_k",)),
    mha("mha-zero_attn", NO_WEIGHTS, (), (), built={"add_zero_attn": True}, missed=("add_zero_attn",)),
    mha("mha-cross", NO_WEIGHTS, cross=True, built={"kdim": WIDTH, "vdim": WIDTH}),
    Row(lambda: Stack(True), narrow(), ("true", "k <= q", "true"), name="transformer-train"),
    Row(
        lambda: Stack(False, norm_first=True),
        narrow(HIDDEN),
        ("~padding[b, k]", "k <= q", "~padding[b, k]"),
        name="transformer-padded",
    ),
]
