"""Dropout on a GPU: compiled kernels keep what the definition keeps, and seeds follow PyTorch's generator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
import torch.nn.functional as F
from comparing import assert_close
from small_llama import DEVICE

from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import k, q, s
from effattn.ir.plan import Plan
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime import philox
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import triton as triton_target

SEED = 2**61 + 2**33 + 5


def plan_of(score, predicate=sympy.true, p: float = 0.3) -> Plan:
    return Plan("exact", replace(AttentionSpec(score, predicate), dropout=p).seeded)


@pytest.mark.parametrize("config", [None, Tiles(64, 16, 4, 2), Tiles(64, 64, 4, 2), Tiles(128, 128, 8, 2)], ids=str)
def test_which_weights_are_kept(config):
    """By values that are a unit matrix."""
    plan, seed = plan_of(s), torch.tensor(SEED, device=DEVICE)
    query = torch.zeros(2, 3, 256, 64, device=DEVICE, dtype=torch.bfloat16)
    key = torch.zeros(2, 3, 128, 64, device=DEVICE, dtype=torch.bfloat16)
    value = torch.eye(128, device=DEVICE, dtype=torch.bfloat16).expand(2, 3, 128, 128)
    out, _ = triton_target.run(plan, query, key, value, [seed], config=config)
    pairs = torch.arange(6).view(2, 3, 1, 1)
    expected = philox.kept(torch.tensor(SEED), plan.spec.least_kept, pairs, (0, 256), [(0, 128)])
    assert torch.equal((out != 0).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients(dtype, head_dim):
    generator, seed = torch.Generator(DEVICE).manual_seed(0), torch.tensor(SEED, device=DEVICE)
    sizes = ((2, 4, 300, head_dim), (2, 2, 300, head_dim), (2, 2, 300, head_dim))
    inputs = [torch.randn(size, device=DEVICE, dtype=dtype, generator=generator) for size in sizes]
    plan = plan_of(head_dim**-0.5 * s, sympy.Le(k, q))

    def results(run, tensors) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = run(*leaves)
        return [out, *torch.autograd.grad((out * out.detach()).sum(), leaves)]

    found = results(lambda *given: torch.ops.effattn.attend(*given, [seed], [], [], plan.encode())[0], inputs)
    wanted = results(lambda *given: reference(plan, *given, [seed])[0], [tensor.double() for tensor in inputs])
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, 3e-2 if dtype == torch.bfloat16 else 2e-3, exact_dtype=False)


def padded(q, k, v, seen):
    weights = (q @ k.mT * 0.125).masked_fill(~seen[:, None, None], torch.finfo(q.dtype).min).softmax(-1)
    return F.dropout(weights, 0.3) @ v


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_seeds_are_pytorchs(mode):
    given = [torch.randn(2, 4, 300, 64, device=DEVICE, requires_grad=True) for _ in range(3)]
    seen = torch.arange(300, device=DEVICE) < torch.tensor([[300], [170]], device=DEVICE)
    fast = torch.compile(padded, backend="effattn", mode=mode)

    def step(seed=None) -> tuple[torch.Tensor, torch.Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        torch.compiler.cudagraph_mark_step_begin()
        out = fast(*given, seen)
        (of_value,) = torch.autograd.grad(out.sum(), given[2:])
        assert_close((of_value * given[2]).sum(), out.sum(), 1e-2)  # the same weights in the backward
        return out.detach().clone(), of_value.clone()

    for _ in range(3):
        step()
    first, second = step(4), step()
    assert (first[0] - second[0]).abs().max() > 0.01
    again = step(4)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_verified(rest):
    given = [torch.randn(2, 4, 300, 64, device=DEVICE) for _ in range(3)]
    seen = torch.arange(300, device=DEVICE) < torch.tensor([[300], [170]], device=DEVICE)
    torch.compile(padded, backend="effattn", options={"rest": rest, "strict": True, "verify": True})(*given, seen)
