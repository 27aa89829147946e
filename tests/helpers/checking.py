"""How kernels are compared with the definition."""

from __future__ import annotations

import torch
from comparing import assert_close

from effattn.lowering.kernels.spec import Tiles
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import triton as triton_target


def check(call, query, key, value, tolerance=None, **options):
    """Run ``call`` through a generated kernel and compare output and LSE with float64; returns both."""
    out, lse = triton_target.run(call.plan, query, key, value, call.captures, call.scalars, call.numbers, **options)
    wanted, wanted_lse = reference(call.plan, query, key, value, call.captures, call.scalars, call.numbers)
    assert out.shape == wanted.shape
    assert out.dtype == query.dtype
    assert lse.is_contiguous()
    assert_close(out, wanted, tolerance, exact_dtype=False)
    assert_close(lse, wanted_lse, tolerance, exact_dtype=False)
    return out, lse


def check_gradients(call, inputs, tolerance=5e-5, config=Tiles(16, 16, 4, 1), through_lse=True):
    """Compare the gradients of query, key, value and every captured tensor of floats with autograd through the
    definition in float64; returns those of query, key and value."""
    names = [load.name for load in call.plan.spec.captures]
    wanted = [name for name, load in zip(names, call.captures, strict=True) if load.is_floating_point()]
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    captures = [load.clone().requires_grad_(name in wanted) for name, load in zip(names, call.captures, strict=True)]
    wanted_out, wanted_lse = reference(call.plan, *leaves, captures, call.scalars, call.numbers)
    grad_out = torch.randn(wanted_out.shape, generator=torch.Generator().manual_seed(9)).to(inputs[0].dtype)
    grad_lse = torch.randn(wanted_lse.shape, generator=torch.Generator().manual_seed(10)) if through_lse else None
    wanted_out.backward(grad_out.double(), retain_graph=True)
    if through_lse:
        # in a row of nothing but the lowest number torch's own logsumexp has a gradient that does not sum to one
        exact = wanted_lse > -1e30
        grad_lse = torch.where(exact, grad_lse, 0.0)
        torch.where(exact, wanted_lse, 0.0).backward(grad_lse.double())
    data = (call.captures, call.scalars, call.numbers)
    out, lse = triton_target.run(call.plan, *inputs, *data, config=config, kind="prefill")
    given = (grad_out, grad_lse, *inputs, out, lse, *data, wanted)
    *grads, of_captures = triton_target.run_backward(call.plan, *given, config=config)
    leaves += [load for load in captures if load.requires_grad]
    tensors = (*inputs, *(load for load in call.captures if load.is_floating_point()))
    for grad, leaf, tensor in zip((*grads, *of_captures), leaves, tensors, strict=True):
        assert grad.shape == tensor.shape
        assert grad.dtype == tensor.dtype
        assert_close(grad, leaf.grad, tolerance, exact_dtype=False)
    return grads
