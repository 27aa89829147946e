"""Kernels over some heads of a tensor: Differential Transformer as published; a softmax with one more to divide by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_llama import DEVICE, assert_as_good, compiled

B, H, N, D, WINDOW = 2, 3, 257, 64, 100


def window(length: int) -> torch.Tensor:
    place = torch.arange(length, device=DEVICE)
    distance = place[:, None] - place
    return (distance < 0) | (distance >= WINDOW)


def differential(q, k, v, factor):
    """q, k [B, 2 H, N, D]: neighbouring heads belong together; v [B, H, N, 2 D]."""
    scores = (q @ k.mT * D**-0.5).masked_fill(window(q.shape[2]), -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).type_as(q).view(B, H, 2, N, N)
    return (weights[:, :, 0] - factor * weights[:, :, 1]) @ v


def off_by_one(q, k, v, factor):
    scores = F.pad((q[:, :H] @ k[:, :H].mT * D**-0.5).masked_fill(window(q.shape[2]), -torch.inf), (0, 1))
    return scores.softmax(-1)[..., :-1] @ v * factor


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, 2 * H, N, D), (B, 2 * H, N, D), (B, H, N, 2 * D), (H, 1, 1)]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("function", [differential, off_by_one], ids=lambda function: function.__name__)
def test_output_and_gradients(function, dtype):
    given = tensors(dtype)
    doubled = [tensor.detach().double().requires_grad_() for tensor in given]

    def both(run, of):
        out = run(*of)
        return [out, *torch.autograd.grad(out.square().sum(), of)]

    actual, eager, wanted = both(compiled(function), given), both(function, given), both(function, doubled)
    for found, plain, true in zip(actual, eager, wanted, strict=True):
        assert_as_good(found, plain, true)
