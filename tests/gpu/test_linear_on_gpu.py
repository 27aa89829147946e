"""Linear attention as a GPU runs it: values, states, gradients, steps, a compiled block, CUDA graphs."""

from __future__ import annotations

import pathlib
import sys
from dataclasses import replace

import pytest
import torch
from comparing import assert_close
from linear_cases import CASES, Case

from effattn.runtime.ops import linear as _registers_the_ops  # noqa: F401
from effattn.runtime.reference.linear import quadratic

ops = torch.ops.effattn
DEVICE = torch.device("cuda")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}  # of the largest value
WIDE = {
    "F 60, Dv 96, groups of 3": Case(1, 6, groups=3, length=2500, features=60, value_dim=96),
    "F 128": Case(1, 4, length=5000, features=128, value_dim=128, state=True),
    "F 256, normalised, groups of 4": Case(1, 4, groups=4, length=3000, features=256, value_dim=128, decay=False,
                                           normalised=True),
}  # fmt: skip
ALL = CASES | WIDE


def on_gpu(case: Case, dtype: torch.dtype, grad: bool = False):
    made = (None if one is None else one.detach().to(DEVICE) for one in case.tensors(dtype))
    query, key, value, decay, state = made
    for one in (query, key, value, state):
        if one is not None:
            one.requires_grad_(grad)
    return query, key, value, decay, state


def close(actual, expected, tolerance):
    assert_close(actual, expected.to(actual.device, torch.float64), tolerance, exact_dtype=False)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ALL)
def test_values(name, dtype):
    case = ALL[name]
    tensors = on_gpu(case, dtype)
    out, state = ops.linear(*tensors, **case.meaning)
    expected, last = quadratic(*tensors, **case.meaning)
    close(out, expected, TOLERANCE[dtype])
    close(state, last, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["a state, groups of 4", "normalised after a state", "F 128", "other keys"])
def test_gradients(name):
    case = ALL[name]
    tensors = on_gpu(case, torch.bfloat16, grad=True)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    out, state = ops.linear(*tensors, **case.meaning)
    expected, last = quadratic(*tensors, **case.meaning)
    weights = torch.randn_like(out), torch.randn_like(state)
    found = torch.autograd.grad((out, state), wanted, weights)
    grads = torch.autograd.grad((expected, last), wanted, [weight.double() for weight in weights])
    for got, want in zip(found, grads, strict=True):
        close(got, want, 5e-2)


def test_a_step_after_a_prefill_is_a_longer_prefill():
    case = replace(WIDE["F 128"], length=300)
    query, key, value, decay, state = on_gpu(case, torch.bfloat16)
    out, last = ops.linear(query, key, value, decay, state, 0.5)
    _, middle = ops.linear(query[:, :, :-1], key[:, :, :-1], value[:, :, :-1], decay, state, 0.5)
    step, end = ops.linear_step(query[:, :, -1:], key[:, :, -1:], value[:, :, -1:], middle, decay, 0.5)
    close(step, out[:, :, -1:], 2e-2)
    close(end, last, 1e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_lightning_block_compiled(mode):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
    from lightning_block import LightningBlock

    torch.manual_seed(0)
    block = LightningBlock(256, 4).to(DEVICE)
    fast = torch.compile(block, backend="effattn", fullgraph=True, options={"mode": mode, "strict": True})
    for length in (700, 700, 1300):
        x = torch.randn(2, length, 256, device=DEVICE)
        with torch.no_grad():
            close(fast(x), block(x), 2e-3)


def test_long_inputs_need_memory_in_proportion():
    peaks = []
    for length in (16_384, 65_536):
        given = [torch.randn(1, 8, length, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.linear(*given, torch.full((8,), -0.01, device=DEVICE))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del given
    assert peaks[1] < 4.5 * peaks[0]
