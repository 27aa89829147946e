"""A mask that a model keeps in a buffer is read as positions, and held against the buffer in every call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from small_llama import DEVICE, assert_as_good, compiled
from torch import nn

import effattn

LONGEST = 512


class Attention(nn.Module):
    """As nanoGPT writes it, without flash attention."""

    def __init__(self, heads: int = 4, width: int = 256):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("bias", torch.ones(LONGEST, LONGEST).tril().view(1, 1, LONGEST, LONGEST))

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        out = scores.softmax(-1) @ v
        return self.out(out.transpose(1, 2).reshape(batch, length, width))


def build(dtype: torch.dtype) -> Attention:
    torch.manual_seed(0)
    return Attention().to(DEVICE, dtype).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=["plain", "graphs"])
def test_replays_follow_their_inputs(dtype, mode):
    model = build(dtype)
    true = Attention().to(DEVICE, torch.float64).eval()
    true.load_state_dict(model.state_dict())
    fast = compiled(model, **({"mode": mode} if mode else {}))
    with torch.no_grad():
        (site,) = effattn.explain(model, torch.zeros(2, 257, 256, device=DEVICE, dtype=dtype)).sites
        assert site.predicate == "k <= q"
        for call in range(5):
            x = torch.randn(2, 257, 256, generator=torch.Generator().manual_seed(call)).to(DEVICE, dtype)
            assert_as_good(fast(x).clone(), model(x), true(x.double()))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=["plain", "graphs"])
def test_a_buffer_that_was_written_to_is_data(mode):
    model = build(torch.float32)
    fast = compiled(model, **({"mode": mode} if mode else {}))
    x = torch.randn(1, 64, 256, device=DEVICE)

    def same():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        same()
        model.load_state_dict(model.state_dict())
        same()
        model.bias[0, 0, 3, 1] = 0
        same()
        model.bias.copy_(torch.ones_like(model.bias).tril())
        same()
        torch.cuda.set_sync_debug_mode("error")  # a look at a counter waits for nothing
        try:
            fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


CHANGED = """
import sys
sys.path[:0] = {path!r}
import torch
from test_mask_buffers_on_gpu import build, compiled
model = build(torch.float32)
fast = compiled(model, mode="reduce-overhead")
x = torch.randn(1, 64, 256, device="cuda")
with torch.no_grad():
    for _ in range(4):
        fast(x)
    torch.cuda.synchronize()
    model.bias.data[0, 0, 3, 7] = 1  # no counter moves; the recorded graph reads it when it is replayed
    print("before", flush=True)
    fast(x)
    torch.cuda.synchronize()
    print("after", flush=True)
"""


def test_a_buffer_that_was_written_to_stops_the_run():
    """In a process of its own: a device assertion leaves no context to go on with."""
    done = subprocess.run(
        [sys.executable, "-c", CHANGED.format(path=[path for path in sys.path if path])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "before" in done.stdout, done.stderr
    assert "after" not in done.stdout
    assert "device-side assert" in done.stderr
