"""Gradients: against finite differences, and against autograd through the definition."""

from __future__ import annotations

import pytest
import sympy
import torch
from comparing import assert_close
from plans import CASES, Sizes, tensors

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.derivative import derivative
from effattn.ir.expr import Where, k, number, q, s
from effattn.ir.plan import Plan
from effattn.runtime.algebra import evaluate
from effattn.runtime.ops import attend
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets.portable import call as portable_call

CPU = torch.device("cpu")


def gradients(out, lse, inputs, weights, lse_weights):
    # in a row of nothing but the smallest number torch's own logsumexp has a gradient that does not sum to one
    through_lse = torch.where(lse < -1e30, 0.0, lse * lse_weights)
    return torch.autograd.grad((torch.nan_to_num(out) * weights).sum() + through_lse.sum(), inputs)


@pytest.mark.parametrize("small", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("name", CASES)
def test_against_autograd_of_the_definition(name, layout, small, monkeypatch):
    if small:
        monkeypatch.setattr(portable_call, "ROWS", 24)
        monkeypatch.setattr(portable_call, "SCORES", 4 * 3 * 24 * 57)
    sizes = Sizes(heads=6, kv_heads=2, head_dim=12, value_dim=8)
    call = CASES[name](sizes, CPU)
    plan = call.plan.dispatched(layout=layout)
    inputs = [tensor.double().requires_grad_() for tensor in tensors(sizes, order=layout)]
    given = (call.captures, call.scalars, call.numbers)
    wanted, wanted_lse = reference(plan, *inputs, *given)
    out, lse = torch.ops.effattn.attend(*inputs, *given, plan.encode())
    weights, lse_weights = torch.randn_like(wanted), torch.randn_like(wanted_lse)
    found = gradients(out, lse, inputs, weights, lse_weights.float())
    for name_of, got, expected in zip(
        "qkv", found, gradients(wanted, wanted_lse, inputs, weights, lse_weights), strict=True
    ):
        assert_close(got, expected, 1e-6, msg=lambda m, n=name_of: f"d{n}: {m}")
        assert (got if layout == "bhnd" else got.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize(
    "name", ["causal", "power_16", "soft_cap", "left_padding", "many_operations", "empty_rows_mean"]
)
def test_finite_differences(name):
    sizes = Sizes(batch=2, heads=2, kv_heads=1, q_len=21, k_len=21, head_dim=3, value_dim=2)
    call = CASES[name](sizes, CPU)
    inputs = [tensor.double().requires_grad_() for tensor in tensors(sizes)]

    def out_of(query, key, value):
        plan = call.plan.encode()
        return torch.ops.effattn.attend(query, key, value, call.captures, call.scalars, call.numbers, plan)[0]

    assert torch.autograd.gradcheck(out_of, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("name", CASES)
def test_strips_against_autograd_of_the_definition(name, layout, small_strips):
    """As above, by the CPU flash kernel where it computes the score."""
    sizes = Sizes(heads=6, kv_heads=2)
    call = CASES[name](sizes, CPU)
    plan = call.plan.dispatched(layout=layout)
    inputs = [tensor.requires_grad_() for tensor in tensors(sizes, order=layout)]
    given = (call.captures, call.scalars, call.numbers)
    wanted, _ = reference(plan, *inputs, *given)
    out, _ = torch.ops.effattn.attend(*inputs, *given, plan.encode())
    weights = torch.randn_like(wanted)
    found, expected = (torch.autograd.grad((torch.nan_to_num(each) * weights).sum(), inputs) for each in (out, wanted))
    assert_close(found, expected, exact_dtype=False)


@pytest.mark.parametrize("path", ["pieces", "strips"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, path, request):
    if path == "strips":
        request.getfixturevalue("small_strips")
    sizes = Sizes(heads=6, kv_heads=2, q_len=130, k_len=130, head_dim=32, value_dim=32)
    call = CASES["power_16"](sizes, CPU)
    inputs = [tensor.requires_grad_() for tensor in tensors(sizes, dtype=dtype)]
    out, lse = torch.ops.effattn.attend(*inputs, [], [], [], call.plan.encode())
    wanted, wanted_lse = reference(call.plan, *inputs)
    weights, lse_weights = torch.randn_like(wanted), torch.randn_like(wanted_lse) * (path == "pieces")
    if path == "strips":  # these give no gradient through the LSE
        found = torch.autograd.grad(out, inputs, weights.to(dtype))
    else:
        found = gradients(out, lse, inputs, weights.to(dtype), lse_weights.float())
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for got, expected in zip(found, gradients(wanted, wanted_lse, inputs, weights, lse_weights), strict=True):
        assert got.dtype == dtype
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        assert error < tolerance


def test_only_the_lse_may_be_used():
    sizes = Sizes()
    inputs = [tensor.double().requires_grad_() for tensor in tensors(sizes)]
    plan = CASES["causal"](sizes, CPU).plan
    _, lse = torch.ops.effattn.attend(*inputs, [], [], [], plan.encode())
    found = torch.autograd.grad(lse.sum(), inputs)
    wanted = torch.autograd.grad(reference(plan, *inputs)[1].sum(), inputs, allow_unused=True, materialize_grads=True)
    for got, expected in zip(found, wanted, strict=True):
        assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("small", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name](Sizes(), CPU).captures])
def test_captured_tensors(name, small, monkeypatch):
    """Every tensor of floats that a score reads, against autograd of the definition."""
    if small:
        monkeypatch.setattr(portable_call, "ROWS", 24)
        monkeypatch.setattr(portable_call, "SCORES", 4 * 3 * 24 * 57)
    sizes = Sizes(heads=6, kv_heads=2, head_dim=12, value_dim=8)
    call = CASES[name](sizes, CPU)
    captures = [load.double().requires_grad_() if load.is_floating_point() else load for load in call.captures]
    inputs = [tensor.double() for tensor in tensors(sizes)]
    learned = [load for load in captures if load.requires_grad]
    if not learned:
        return
    wanted, wanted_lse = reference(call.plan, *inputs, captures, call.scalars, call.numbers)
    out, lse = torch.ops.effattn.attend(*inputs, captures, call.scalars, call.numbers, call.plan.encode())
    weights, lse_weights = torch.randn_like(wanted), torch.randn_like(wanted_lse)
    found = gradients(out, lse, learned, weights, lse_weights.float())
    expected = gradients(wanted, wanted_lse, learned, weights, lse_weights)
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("name", ["alibi", "bias", "bias_by_distance", "decomposed_positions", "scale_per_head"])
def test_finite_differences_of_captured_tensors(name):
    sizes = Sizes(batch=2, heads=2, kv_heads=1, q_len=16, k_len=16, head_dim=3, value_dim=2)
    call = CASES[name](sizes, CPU)
    captures = [load.double().requires_grad_() for load in call.captures]

    def out_of(*captures):
        return torch.ops.effattn.attend(*(x.double() for x in tensors(sizes)), captures, [], [], call.plan.encode())[0]

    assert torch.autograd.gradcheck(out_of, captures, fast_mode=True)


def test_there_is_no_second_derivative():
    sizes = Sizes(q_len=9, k_len=9)
    inputs = [tensor.requires_grad_() for tensor in tensors(sizes)]
    out, _ = torch.ops.effattn.attend(*inputs, [], [], [], Plan("exact", AttentionSpec(s)).encode())
    (first,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    with pytest.raises(attend.NoGradient):
        first.sum().backward()
    call = CASES["alibi"](sizes, CPU)
    slopes = call.captures[0].requires_grad_()
    out, _ = torch.ops.effattn.attend(*inputs, [slopes], [], [], call.plan.encode())
    (first,) = torch.autograd.grad(out.sum(), slopes, create_graph=True)
    with pytest.raises(attend.NoGradient):
        first.sum().backward()


@pytest.mark.parametrize(
    "score",
    [
        0.125 * s,
        30 * sympy.tanh(s / 30),
        Where(k < q, s / 2, s * s),
        sympy.Max(s, 0.25),
        sympy.Min(s, sympy.Max(q, -s)),
        sympy.Abs(s) + sympy.exp(-s * s),
        sympy.sqrt(1 + s * s),
        1 / sympy.sqrt(1 + s * s),
        s**8 + (1 + s**2) ** -8,
        1 / (1 + sympy.exp(-s)),
        sympy.log(1 + s**2) * number("c"),
    ],
    ids=str,
)
def test_derivatives(score):
    at = {"q": 1, "k": 0, "c": 0.7}
    values = torch.linspace(-2, 2, 23, dtype=torch.float64).requires_grad_()
    result = evaluate(score, {**at, "s": values}, {}, torch.float64, "cpu")
    (wanted,) = torch.autograd.grad(result.sum(), values)
    found = evaluate(derivative(score), {**at, "s": values.detach()}, {}, torch.float64, "cpu")
    assert_close(torch.as_tensor(found, dtype=torch.float64).expand_as(wanted), wanted)


def test_no_n_by_n_tensor_in_the_backward(monkeypatch):
    from test_portable import LargestTensor

    monkeypatch.setattr(portable_call, "ROWS", 32)
    monkeypatch.setattr(portable_call, "SCORES", 2**18)
    sizes = Sizes(1, 4, 2, 1024, 1024, 16, 16)
    inputs = [tensor.requires_grad_() for tensor in tensors(sizes)]
    score = 20 * sympy.tanh(s / 80)
    out, _ = torch.ops.effattn.attend(*inputs, [], [], [], Plan("exact", AttentionSpec(score, expr.k <= q)).encode())
    with LargestTensor() as largest:
        out.sum().backward()
    assert largest.elements < 1024 * 1024 / 8
