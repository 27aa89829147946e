"""What README.md says effattn assumes, and what ``verify`` finds where it does not hold."""

from __future__ import annotations

import pytest
import torch

from effattn.errors import EffattnError, VerificationError

N, D = 300, 8  # more rows than the portable target takes at once, so that some keys are never visited


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, N, D, generator=generator) for _ in range(3)]


def fast(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="effattn", options={"rest": "eager", **options})


def causal(q, k, v):
    i = torch.arange(q.shape[2])
    return (q @ k.mT).masked_fill(i > i[:, None], -1e9).softmax(-1) @ v


def window(q, k, v):
    i = torch.arange(q.shape[2])
    hidden = (i > i[:, None]) | (i < i[:, None] - 15)
    return (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def soft_cap(q, k, v):
    i = torch.arange(q.shape[2])
    return torch.tanh(q @ k.mT).masked_fill(i > i[:, None], -torch.inf).softmax(-1) @ v


def written_between(q, k, v, other):
    i = torch.arange(q.shape[2])
    scores = (q @ k.mT).masked_fill(i > i[:, None], -torch.inf)
    other.zero_()
    return scores.softmax(-1) @ v


def test_scores_above_the_fill_are_the_same():
    q, k, v = qkv()
    torch.testing.assert_close(fast(causal, verify=True)(q, k, v), causal(q, k, v), rtol=1e-4, atol=1e-4)


def test_scores_below_the_fill_are_found_by_verify():
    q, k, v = qkv()
    with pytest.raises(VerificationError, match="differ from the model's own mask"):
        fast(causal, verify=True)(q * 1e5, k * 1e5, v)


def test_nan_at_a_masked_key_is_found_by_verify():
    """0 * NaN is NaN in user code; a kernel that never visits the key gives a number."""
    q, k, v = qkv()
    v[:, :, 0] = torch.nan
    assert window(q, k, v).isnan().all()
    assert not fast(window)(q, k, v)[:, :, N // 2 :].isnan().any()
    with pytest.raises(VerificationError, match="is NaN where the untouched graph is not, or not where it is"):
        fast(window, verify=True)(q, k, v)


@pytest.mark.parametrize("function", [causal, soft_cap])
def test_a_second_derivative_is_an_error(function):
    q, k, v = (x[:, :, :16].clone().requires_grad_() for x in qkv())
    (gradient,) = torch.autograd.grad(fast(function)(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises((RuntimeError, EffattnError), match="derivative"):
        gradient.square().sum().backward()


def test_inputs_that_overlap_when_compiled_are_left_alone():
    q, k, v = qkv()
    expected = written_between(q, k.clone(), v, torch.zeros(N))
    torch.testing.assert_close(fast(written_between)(q, k, v, k[:, :1]), expected, rtol=1e-4, atol=1e-4)


def test_inputs_that_overlap_later_are_found_by_verify():
    """Compiled with tensors apart, called with one inside the other: verify's copies are apart, the result is not."""
    q, k, v = qkv()
    function = fast(written_between, verify=True)
    function(q, k, v, k[:, :1].clone())
    with pytest.raises(VerificationError, match="output 0"):
        function(q, k, v, k[:, :1])
