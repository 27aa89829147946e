"""Kernels of linear attention on Triton's interpreter against float64."""

from __future__ import annotations

import functools
import re

import linear_specs
import pytest
import torch
from comparing import assert_close
from linear_cases import CASES, Case

from effattn.lowering.kernels.linear.source import file_name, generate
from effattn.lowering.kernels.linear.spec import LinearTiles
from effattn.runtime.ops.linear import SCHEMAS
from effattn.runtime.reference.linear import quadratic
from effattn.runtime.targets.triton import linear as linear_triton

SMALL, LARGE = LinearTiles(16, 16, 4, 1), LinearTiles(64, 64, 4, 1)
ODD = {
    "N 257, F 60, Dv 96, groups of 3": Case(1, 3, groups=3, length=257, features=60, value_dim=96),
    "N 49, F 128, Dv 64, normalised": Case(1, 1, length=49, features=128, value_dim=64, normalised=True, decay=False),
}

ops = torch.ops.effattn
close = functools.partial(assert_close, tolerance=1e-4)


@pytest.mark.parametrize("name", [*CASES, *ODD])
def test_values(name):
    """Parts of two chunks, so that states are carried; backwards in time as well."""
    case = (CASES | ODD)[name]
    query, key, value, decay, state = case.tensors()
    expected, last = quadratic(query, key, value, decay, state, **case.meaning)
    tiles, span = (LARGE, 128) if name in ODD else (SMALL, 32)
    meaning = {"scale": 0.5, "causal": case.causal, "ones": case.normalised, "eps": case.meaning.get("eps", 0.0)}
    for reverse in (False, True) if case.causal else (False,):
        turned = [tensor.flip(2) if reverse else tensor for tensor in (query, key, value)]
        out = torch.full((*query.shape[:3], value.shape[3]), torch.nan)
        final = linear_triton.run(*turned, decay, state, out, reverse=reverse, tiles=tiles, span=span, **meaning)
        close(out.flip(2).double() if reverse else out.double(), expected)
        close(final.double(), last)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.state and case.causal])
def test_steps(name):
    case = CASES[name]
    tensors = case.tensors()
    query, key, value = (tensor[:, :, :5] for tensor in tensors[:3])
    expected, last = quadratic(query, key, value, *tensors[3:], **case.meaning)
    args = {"target": "triton", **{name: value for name, value in case.meaning.items() if name != "causal"}}
    out, state = ops.linear_step(query, key, value, tensors[4], tensors[3], **args)
    close(out.double(), expected)
    close(state.double(), last)


@pytest.mark.parametrize("name", ["a state, groups of 4", "normalised after a state", "other keys"])
def test_gradients(name):
    case = CASES[name]
    tensors = case.tensors(grad=True)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    expected = quadratic(*tensors, **case.meaning)
    found = ops.linear(*tensors, **case.meaning, target="triton")
    torch.manual_seed(1)
    weights = [torch.randn_like(tensor) for tensor in found]
    grads = torch.autograd.grad(expected, wanted, [weight.double() for weight in weights])
    for got, want in zip(torch.autograd.grad(found, wanted, weights), grads, strict=True):
        close(got, want, tolerance=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_strides_and_layout(dtype):
    """Heads beside each other in memory, and states larger than float16 can hold."""
    case = Case(1, 2, length=40, state=True)
    query, key, value, decay, state = case.tensors(dtype)
    query, key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value))
    state = state * 1e6
    query = query * 1e-3
    out, last = ops.linear(query, key, value, decay, state, layout="bnhd", target="triton")
    expected, final = quadratic(query, key, value, decay, state)
    assert out.transpose(1, 2).is_contiguous()
    assert_close(out, expected, 2e-2, exact_dtype=False)
    assert_close(last.double(), final, 1e-2)


def test_parts_leave_no_multiprocessor_idle():
    for programs, length in ((64, 8192), (64, 131072), (8192, 8192), (1, 1), (4, 100)):
        span = linear_triton.span_for(programs, length, 64, 132)
        assert span % 64 == 0
        parts = -(-length // span)
        assert parts == 1 or programs * parts >= 132 or span <= linear_triton.LEAST_SPAN
        assert (parts - 1) * span < length


def test_file_names_are_readable():
    one = linear_specs.spec("sm90", decay=True, features=60, value_dim=64)
    assert re.fullmatch(r"linear_chunks_decay_bf16_f60x64_[0-9a-f]{8}\.py", file_name(one, generate(one)))


def test_every_op_is_registered():
    assert all(hasattr(ops, name) for name in SCHEMAS)
