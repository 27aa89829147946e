"""Generated gradients on the interpreter against autograd through the definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checking import check_gradients
from comparing import assert_close
from plans import CASES, Sizes, tensors

import effattn.runtime.ops  # noqa: F401  (registers torch.ops.effattn)
from effattn.ir.refusal import Why
from effattn.lowering.kernels.generate import generate, no_backward
from effattn.lowering.kernels.spec import KernelSpec, Tiles
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import triton as triton_target
from effattn.runtime.targets.triton.limits import UnsupportedCall

CPU = torch.device("cpu")
SMALL = Tiles(16, 16, 4, 1)
SERVED = [name for name, build in CASES.items() if no_backward(build(Sizes(), CPU).plan.spec, 16, 16) is None]


@pytest.mark.parametrize("name", SERVED)
def test_every_plan(name):
    sizes = Sizes(heads=2, kv_heads=1, q_len=43, k_len=43, value_dim=24)
    check_gradients(CASES[name](sizes, CPU), tensors(sizes))


def test_which_plans_are_served():
    assert set(SERVED) == set(CASES)


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (17, 40), (40, 17), (33, 33)])
@pytest.mark.parametrize("name", ["none", "causal_from_the_end", "wide_window_and_sinks", "two_sided_window"])
def test_lengths(name, q_len, k_len):
    sizes = Sizes(heads=3, kv_heads=1, q_len=q_len, k_len=k_len)
    check_gradients(CASES[name](sizes, CPU), tensors(sizes), through_lse=False)


@pytest.mark.parametrize(("dim", "order", "layout"), [(60, "bnhd", "bnhd"), (24, "dnbh", "bhnd"), (96, "bhdn", "bnhd")])
def test_shapes_and_strides(dim, order, layout):
    sizes = Sizes(batch=1, heads=4, kv_heads=2, q_len=35, k_len=35, head_dim=dim, value_dim=dim + 4)
    call = CASES["left_padding"](sizes, CPU)
    call.plan = call.plan.dispatched(layout=layout)
    for grad in check_gradients(call, tensors(sizes, order=order), config=Tiles(32, 16, 4, 1)):
        assert (grad if layout == "bhnd" else grad.transpose(1, 2)).is_contiguous()


MATRIX = [  # score and mask, head_dim, groups, queries, keys, dtype
    ("soft_cap", 60, 1, 17, 40, torch.float32),
    ("alibi", 64, 3, 40, 17, torch.float16),
    ("bias_by_distance", 96, 4, 33, 20, torch.bfloat16),
    ("left_padding", 128, 8, 20, 36, torch.float32),
    ("bias", 256, 1, 18, 21, torch.float32),
    ("window_per_head", 64, 4, 35, 35, torch.float16),
    ("power_at_an_offset", 64, 8, 33, 50, torch.float32),
    ("scale_per_head", 96, 3, 21, 33, torch.bfloat16),
    ("decomposed_positions", 60, 4, 24, 40, torch.float16),
    ("empty_rows_uniform", 64, 3, 30, 30, torch.float32),
    ("smallest_number_bias", 128, 4, 19, 19, torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dim", "groups", "q_len", "k_len", "dtype"), MATRIX, ids=[row[0] for row in MATRIX])
def test_sizes_and_dtypes(name, dim, groups, q_len, k_len, dtype):
    """Through output and LSE, and of captured tensors."""
    sizes = Sizes(1, 2 * groups, 2, q_len, k_len, dim, dim)
    tolerance = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    check_gradients(CASES[name](sizes, CPU), tensors(sizes, dtype=dtype), tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "soft_cap", "bias"])
def test_half_precision(name, dtype):
    sizes = Sizes()
    check_gradients(
        CASES[name](sizes, CPU), tensors(sizes, dtype=dtype), tolerance=1e-2 if dtype == torch.float16 else 6e-2
    )


def test_a_learned_bias_of_documents():
    """The tiles that such a gradient has, and a block map of them."""
    sizes = Sizes(q_len=80, k_len=80)
    call, masked = CASES["bias"](sizes, CPU), CASES["documents"](sizes, CPU)
    captures = (*call.plan.spec.captures, *masked.plan.spec.captures)
    call.plan = replace(call.plan, spec=replace(masked.plan.spec, score=call.plan.spec.score, captures=captures))
    call.captures += masked.captures
    check_gradients(call, tensors(sizes), config=None)


def test_scores_that_are_large_in_every_row():
    """An LSE of a million keeps no digits of the logarithm of a sum: the weights would be off by some percent."""
    sizes = Sizes(q_len=40, k_len=40)
    call = CASES["bias"](sizes, CPU)
    call.captures[0] = call.captures[0].round() + torch.where(torch.arange(sizes.q_len)[:, None] % 3 > 0, 2.0**22, 0.0)
    query, key, value = tensors(sizes)
    check_gradients(call, [torch.zeros_like(query), key, value])  # scores that float32 holds exactly


def test_functions_of_the_score_are_computed_once():
    """The derivative of tanh is 1 - tanh^2, of the tanh that the score has."""
    plan = CASES["soft_cap"](Sizes(), CPU).plan
    text = generate(KernelSpec("backward", "exact", plan.spec, "bfloat16", 64, 64, 1, SMALL))
    loops = text.split("for ")[1:]
    assert [loop.count("_tanh(") for loop in loops if "of_scores" in loop] == [1, 1, 1, 1]
    assert "slope = 0.25 - 0.25 * (tanh_0 * tanh_0)" in text
    assert "sqrt" not in text


def test_through_the_op():
    """Autograd reaches the generated kernels when a plan asks for them."""
    sizes = Sizes(heads=4, kv_heads=2, q_len=40, k_len=40)
    call = CASES["left_padding"](sizes, CPU)
    inputs = [tensor.requires_grad_() for tensor in tensors(sizes)]
    plan = call.plan.dispatched(target="triton", layout="bnhd")
    out, _ = torch.ops.effattn.attend(*inputs, call.captures, [], [], plan.encode())
    wanted, _ = reference(call.plan, *inputs, call.captures)
    assert_close(out, wanted, exact_dtype=False)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    expected = torch.autograd.grad((wanted * weight).sum(), inputs)
    for grad, other in zip(got, expected, strict=True):
        assert_close(grad, other, 5e-5)


def test_what_is_not_served_goes_to_the_portable_target():
    """As its rule says, which the op asks before it runs."""
    sizes = Sizes(heads=2, kv_heads=1, q_len=20, k_len=20, head_dim=260, value_dim=260)
    call, inputs = CASES["causal"](sizes, CPU), [tensor.requires_grad_() for tensor in tensors(sizes)]
    assert triton_target.why_no_backward(call.plan.spec, 260, 260).rule == Why.HEAD_DIM
    data = (call.captures, call.scalars, call.numbers)
    plans = [call.plan.dispatched(target=target).encode() for target in ("triton", "portable")]
    found = [torch.autograd.grad(torch.ops.effattn.attend(*inputs, *data, plan)[0].sum(), inputs) for plan in plans]
    for got, want in zip(*found, strict=True):
        assert_close(got, want, 5e-5)
    out, lse = triton_target.run(call.plan, *inputs, *data, config=SMALL)
    with pytest.raises(UnsupportedCall, match="no gradient by generated kernels"):
        triton_target.run_backward(call.plan, out, None, *inputs, out, lse, *data, config=SMALL)
