"""A TransNormer block with Lightning attention, written as its paper defines it, through effattn.

    python examples/lightning_block.py

Its attention is ``((q k^T) * M) v`` with ``M_ij = exp(-slope * (i - j))`` for the keys up to the query: N x N numbers
per head, as anybody writes it first (TransNormerLLM, arXiv 2307.14995, section 3). Compiled with ``backend="effattn"``
it is the same function in O(N), with the slopes of the model, gradients included.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effattn


class LightningAttention(nn.Module):
    """Linear attention with one fixed decay per head, an output norm and a gate; no softmax, no scale."""

    def __init__(self, width: int, heads: int, layer: int, layers: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.gate, self.out = (nn.Linear(width, width) for _ in range(5))
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        self.register_buffer("slopes", slopes * (1 - layer / max(layers - 1, 1) + 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        batch, length, width = x.shape

        def by_head(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, -1).transpose(1, 2)

        query, key = by_head(F.silu(self.q_proj(x))), by_head(F.silu(self.k_proj(x)))
        value = by_head(self.v_proj(x))
        place = torch.arange(length, device=x.device)
        distance = place[:, None] - place[None, :]
        decay = torch.exp(-self.slopes[:, None, None] * distance.clamp(min=0)).masked_fill(distance < 0, 0.0)
        mixed = ((query @ key.transpose(-1, -2)) * decay.to(x.dtype)) @ value
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        return self.out(simple_rms_norm(mixed) * self.gate(x))


class GatedMixer(nn.Module):
    """SGLU: a gated channel mixer without an activation."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.value, self.gate, self.out = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.value(x) * self.gate(x))


class LightningBlock(nn.Module):
    """Token mixer and channel mixer, each after a norm and beside a residual."""

    def __init__(self, width: int = 256, heads: int = 4, layer: int = 0, layers: int = 4):
        super().__init__()
        self.attention, self.mixer = LightningAttention(width, heads, layer, layers), GatedMixer(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(simple_rms_norm(x))
        return x + self.mixer(simple_rms_norm(x))


def simple_rms_norm(x: Tensor) -> Tensor:
    """SRMSNorm: to root mean square 1, without parameters."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-8)


def seconds(function, *args) -> float:
    function(*args)
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def main(length: int = 2048) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = LightningBlock().to(device)
    x = torch.randn(1, length, 256, device=device)
    report = effattn.explain(block, x)
    print(report)
    fast = torch.compile(block, backend="effattn")
    expected, actual = block(x), fast(x)
    print(f"\nlargest difference from eager, float32: {(expected - actual).abs().max().item():.2g}")
    grads = [torch.autograd.grad(out.square().mean(), tuple(block.parameters())) for out in (expected, actual)]
    apart = max((a - b).abs().max().item() for a, b in zip(*grads, strict=True))
    print(f"largest difference of a gradient:       {apart:.2g}")
    with torch.no_grad():
        print(f"eager {1e3 * seconds(block, x):.0f} ms, effattn {1e3 * seconds(fast, x):.0f} ms at {length:,} tokens")


if __name__ == "__main__":
    main()
