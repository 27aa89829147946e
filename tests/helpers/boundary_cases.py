"""Boundary predictors for tests: files of random weights, and the definition from torch's own modules in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from effattn.lowering.forms import boundary_weights

HEADS, KV_HEADS, DIM = 4, 2, 8
CHANNELS, HIDDEN = KV_HEADS * DIM, 12


class Published(nn.Module):
    """The predictor as the authors' code computes it, from torch's own modules."""

    def __init__(self, tensors, heads, window, channels=CHANNELS):
        super().__init__()
        self.window = window
        hidden = tensors["mlp.0.bias"].shape[0]
        self.enc = nn.ModuleDict(
            {"mha": nn.MultiheadAttention(channels, heads, batch_first=True), "norm": nn.LayerNorm(channels)}
        )
        self.mlp = nn.Sequential(nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        gated = "pool.gate.weight" in tensors
        self.pool = nn.ModuleDict({"gate": nn.Linear(channels, 1, bias=False)}) if gated else None
        self.load_state_dict(tensors)
        self.double()

    def half(self, tokens):
        if self.pool is None:
            return tokens.mean(0)
        return (self.pool["gate"](tokens).softmax(0) * tokens).sum(0)

    @torch.no_grad()
    def forward(self, key):
        """[Hkv, N, D] to the logit after each token: float64 [N]."""
        tokens = key.double().transpose(0, 1).flatten(1)
        padded = F.pad(tokens, (0, 0, self.window - 1, self.window))
        found = []
        for gap in range(tokens.shape[0]):
            seen = padded[None, gap : gap + 2 * self.window]
            mixed = self.enc["norm"](self.enc["mha"](seen, seen, seen, need_weights=False)[0])[0]
            left, right = self.half(mixed[: self.window]), self.half(mixed[self.window :])
            alike = F.cosine_similarity(left, right, dim=0, eps=1e-6)[None]
            found.append(self.mlp(torch.cat([left, right, (left - right).abs(), left * right, alike])))
        return torch.cat(found)


def random_tensors(pool=False, seed=0, channels=CHANNELS, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    wanted = boundary_weights.shapes(channels, hidden) | ({"pool.gate.weight": (1, channels)} if pool else {})
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in wanted.items()}


def save(path, prefixed, **metadata):
    import safetensors.torch as safetensors

    safetensors.save_file(
        {prefix + name: tensor for prefix, tensors in prefixed.items() for name, tensor in tensors.items()},
        path,
        {"heads": "4", **metadata},
    )
    return str(path)
