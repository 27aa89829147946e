"""The LSE of the portable target is as good as that of scores in float32, whatever the dtype of query and key."""

from __future__ import annotations

import pytest
import torch
from plans import CASES, Sizes, tensors
from sites import causal_site
from torch.nn.attention.flex_attention import flex_attention

from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import k, q, s
from effattn.ir.plan import Dispatch, Plan, Sparsity
from effattn.lowering.forms import FORMS
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import sdpa
from effattn.runtime.targets.portable import run

HALF = (torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps
CAUSAL = Plan("exact", AttentionSpec(0.125 * s, k <= q))


def random(dtype, length, dim=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, dim, generator=generator).to(dtype) for _ in range(3)]


def assert_as_in_float32(lse, wanted):
    met = wanted > -torch.inf
    assert torch.equal(met, lse > -torch.inf)
    assert (lse.double() - wanted)[met].abs().max() < 8 * EPS * max(1.0, wanted[met].abs().max().item())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["causal", "left_padding", "soft_cap", "alibi"])
def test_every_kind_of_score(name, dtype):
    sizes = Sizes(q_len=70, k_len=70)
    call = CASES[name](sizes, torch.device("cpu"))
    made = tensors(sizes, dtype=dtype)
    given = (call.captures, call.scalars, call.numbers)
    assert_as_in_float32(run(call.plan, *made, *given)[1], reference(call.plan, *made, *given)[1])


@pytest.mark.parametrize("dtype", HALF)
def test_the_kernel_of_sdpa(dtype):
    made = random(dtype, 300)
    out, lse = sdpa.dense(CAUSAL, *made).run(*made, [], [])
    assert out.dtype == dtype
    assert_as_in_float32(lse, reference(CAUSAL, *made)[1])


@pytest.mark.parametrize("dtype", HALF)
def test_keys_that_data_chooses(dtype):
    form = FORMS["proxy"]
    plan = Plan(
        "proxy", AttentionSpec(0.125 * s, k <= q), Sparsity(form.selector(form.params(gamma=1.0), causal_site()))
    )
    made = random(dtype, 100)
    assert_as_in_float32(run(plan, *made)[1], reference(CAUSAL, *made)[1])


@pytest.mark.parametrize("dtype", HALF)
def test_what_flex_attention_returns(dtype):
    def call(q, k, v):
        return flex_attention(
            q, k, v, lambda score, b, h, i, j: torch.where(j + 3 < i, score, -torch.inf), return_lse=True
        )

    torch._dynamo.reset()
    made = random(dtype, 64)
    out, lse = torch.compile(call, backend="effattn", options={"rest": "eager", "strict": True})(*made)
    wanted_out, wanted = call(*(tensor.double() for tensor in made))
    assert_as_in_float32(lse, wanted)
    eager_out, _ = call(*made)
    errors = [(found.double() - wanted_out).nan_to_num().abs().max() for found in (out, eager_out)]
    assert errors[0] <= errors[1] * 1.01


@pytest.mark.parametrize("dtype", HALF)
def test_the_output_is_as_good_as_that_of_sdpa(dtype):
    made = random(dtype, 70)
    for plan in (CAUSAL, Plan("exact", AttentionSpec(0.125 * s, k <= q), dispatch=Dispatch(lse_is_read=False))):
        out, _ = run(plan, *made)
        wanted, _ = reference(plan, *made)
        theirs = torch.nn.functional.scaled_dot_product_attention(*made, is_causal=True, scale=0.125)
        errors = [(found.double() - wanted).abs().max() for found in (out, theirs)]
        assert errors[0] <= errors[1] * 1.01
