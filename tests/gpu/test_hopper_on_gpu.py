"""Kernels in the Gluon dialect, and those in the Triton dialect that they stand in for, on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from plans import CASES, Sizes, tensors
from test_kernels_on_gpu import assert_right, call_of

from effattn.lowering.schedules import attention as configs
from effattn.runtime.ops import attend as _registers_the_op  # noqa: F401
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import triton as triton_target
from effattn.runtime.targets.triton.backward import CALLS as BACKWARD
from effattn.runtime.targets.triton.forward import CALLS

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="Gluon kernels are for Hopper"
)
# (head_dim, value_dim, heads, key heads, queries, keys)
SHAPES = {
    "one token": (128, 128, 4, 4, 1, 1),
    "17 tokens": (64, 64, 6, 2, 17, 17),
    "D 96, values 80": (96, 80, 8, 1, 257, 257),
    "D 192, values 128": (192, 128, 8, 2, 300, 300),
    "D 256": (256, 256, 8, 8, 513, 513),
    "more keys": (128, 128, 8, 2, 129, 700),
    "more queries": (128, 128, 4, 1, 700, 130),
}


def is_gluon(calls) -> bool:
    """Whether the last call went to a Gluon kernel."""
    launch = list(calls._calls.values())[-1].launch
    return "gluon" in launch.__globals__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["causal", "left_padding", "soft_cap", "bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, name, dtype):
    dim, value_dim, heads, kv_heads, q_len, k_len = SHAPES[shape]
    sizes = Sizes(2, heads, kv_heads, q_len, k_len, dim, value_dim)
    call = call_of(name, sizes)
    given = tensors(sizes, DEVICE, dtype, order="bnhd")
    triton_target.forget()
    out, lse = triton_target.run(call.plan, *given, call.captures, call.scalars, call.numbers, kind="prefill")
    assert is_gluon(CALLS)
    assert_right(call, "prefill", given, out, lse)


@pytest.mark.parametrize("name", CASES)
def test_the_triton_dialect(name):
    """Its tiles are given, so that Gluon is not tried."""
    sizes = Sizes(2, 8, 2, 333, 333, 64, 64)
    call = call_of(name, sizes)
    given = tensors(sizes, DEVICE, torch.bfloat16)
    tiles = configs.choose("prefill", call.plan.complete, "sm90", 16, 64, 64)
    triton_target.forget()
    out, lse = triton_target.run(
        call.plan, *given, call.captures, call.scalars, call.numbers, kind="prefill", config=tiles
    )
    assert not is_gluon(CALLS)
    assert_right(call, "prefill", given, out, lse)


@pytest.mark.parametrize("dialect", ["gluon", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, dialect):
    """From the output and LSE of the definition, with a gradient of both."""
    sizes = Sizes(2, 8, 2, 257, 257, 64, 64)
    call = call_of(name, sizes)
    data = (call.captures, call.scalars, call.numbers)
    plan = call.plan.complete
    if triton_target.why_no_backward(plan.spec, 64, 64) is not None:
        pytest.skip("the portable target computes it")
    if plan is not call.plan or plan.spec.empty_rows == "nan":
        pytest.skip("reads the first key of each text, which the op finds; or the gradient is NaN")
    given = tensors(sizes, DEVICE, torch.bfloat16)
    leaves = [tensor.detach().double().requires_grad_() for tensor in given]
    wanted, wanted_lse = reference(call.plan, *leaves, *data)
    out, lse = triton_target.run(call.plan, *given, *data, kind="prefill")
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(out.shape, generator=generator).to(DEVICE, out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(DEVICE)
    # beyond that, float64 does not hold how many keys share the greatest score: autograd's own gradient of LSE is wrong
    met = wanted_lse.abs() < 1e6
    total = (wanted.nan_to_num() * grad.double()).sum() + (wanted_lse.where(met, 0.0) * grad_lse.double()).sum()
    total.backward()
    tiles = configs.choose("backward", plan, "sm90", 16, 64, 64) if dialect == "triton" else None
    triton_target.forget()
    *found, _ = triton_target.run_backward(
        plan, grad, grad_lse.where(met, 0.0).float(), *given, out, lse, *data, config=tiles
    )
    if dialect == "triton":
        assert not is_gluon(BACKWARD)
    for tensor, leaf in zip(found, leaves, strict=True):
        size = max(leaf.grad.abs().max().item(), 1e-2)
        assert (tensor.double() - leaf.grad).abs().max().item() < 2e-2 * size


def test_gluon_gradients_are_tried():
    """What the tests above compare is not the Triton dialect alone."""
    sizes = Sizes(2, 8, 2, 257, 257, 128, 128)
    for name in ("causal", "documents", "soft_cap", "alibi"):
        call = call_of(name, sizes)
        data = (call.captures, call.scalars, call.numbers)
        given = tensors(sizes, DEVICE, torch.bfloat16)
        out, lse = triton_target.run(call.plan, *given, *data, kind="prefill")
        triton_target.forget()
        found = [triton_target.run_backward(call.plan, out, None, *given, out, lse, *data) for _ in range(2)]
        assert is_gluon(BACKWARD)
        assert all(torch.equal(one, other) for one, other in zip(found[0][:3], found[1][:3], strict=True))
