"""What reads trained weights, on a GPU: cuts of the boundary predictor, softmax in a window before linear attention."""

from __future__ import annotations

import pytest
import torch
from boundary_cases import random_tensors, save
from comparing import assert_close

from effattn.ir.selector import Trained
from effattn.lowering.forms.tensor_file import digest_of
from effattn.runtime.ops.window_hybrid import window_hybrid
from effattn.runtime.reference.hybrid import hybrid
from effattn.runtime.selection import predictor

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}  # of the largest value


def made(length, dtype, heads=8, kv_heads=2, dim=64, features=128):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dim), (heads, features), (kv_heads, features))
    tensors = [torch.randn(1, h, length, width, generator=generator) for h, width in shapes]
    tensors[3:] = [tensor.softmax(-1) for tensor in tensors[3:]]
    return [*(tensor.to(dtype) for tensor in tensors), torch.rand(heads, generator=generator) * 0.8 + 0.1]


@pytest.mark.parametrize("length", [5, 1000, 5000])
def test_cuts_are_those_of_the_cpu_and_nothing_waits(tmp_path, length):
    pytest.importorskip("safetensors")
    path = save(tmp_path / "cut.safetensors", {"all.": random_tensors(channels=128, hidden=64)})
    piece = Trained(weights=path, digest=digest_of(path), threshold=0.2)
    key = made(length, torch.float32)[1]
    there = key.cuda()
    found = predictor.cuts(piece, there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        predictor.cuts(piece, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # rounding may decide between two that are nearly equal
    assert (found.cpu() != predictor.cuts(piece, key)).sum() <= length // 500


@pytest.mark.parametrize("terraced", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("length", [1, 130, 1500])
def test_a_window_is_its_definition(length, dtype, terraced):
    given = [tensor.cuda().requires_grad_() for tensor in made(length, dtype)]
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    out = window_hybrid(*given, 64, terraced, 0.125)
    near = [tensor.cpu() for tensor in wide]
    wanted = hybrid(*near, window=64, terraced=terraced, scale=0.125)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = (out, *torch.autograd.grad(out, given, grad.to(out)))
    expected = (wanted, *torch.autograd.grad(wanted, wide, grad, materialize_grads=True))
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        slack = 20 if number == 6 else 1  # gamma's is a sum over all rows of differences that nearly cancel
        assert_close(one.cpu(), other.cpu(), slack * TOLERANCE[dtype], exact_dtype=False)
