"""A softmax that is written out is found where it surely is one, and stays as it is written everywhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled

from effattn.ir.refusal import Why

B, H, N, D = 2, 3, 9, 8


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def amax(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def greatest(q, k, v):
    scores = q @ k.mT
    weights = (scores - torch.max(scores, dim=-1, keepdim=True)[0]).exp()
    return (weights / torch.sum(weights, dim=-1, keepdim=True)) @ v


def detached(q, k, v):
    scores = q @ k.mT
    weights = (scores - scores.max(-1, True).values.detach()).exp()
    return weights.div(weights.sum(dim=[-1], keepdim=True)) @ v


def logsumexp(q, k, v):
    scores = q @ k.mT
    return torch.exp(scores - scores.logsumexp(-1, True)) @ v


def divided_after_the_product(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True)


def divided_after_a_cast(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.ones(N, N).triu(1) > 0, -torch.inf).float()
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhqk,bhkd->bhqd", weights.to(v.dtype), v).div(weights.sum(-1)[..., None])


def sum_without_gradient(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    with torch.no_grad():
        total = weights.sum(-1, keepdim=True)
    return (weights / total) @ v


def logsumexp_without_gradient(q, k, v):
    scores = q @ k.mT
    with torch.no_grad():
        total = scores.logsumexp(-1, True)
    return torch.exp(scores - total) @ v


def sum_detached_after_the_product(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True).detach()


def weights_without_gradient_after_the_product(q, k, v):
    with torch.no_grad():
        scores = q @ k.mT
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True)


def without_gradient(q, k, v):
    with torch.no_grad():
        scores = q @ k.mT
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v


def another_maximum(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-2, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def another_sum(q, k, v):
    weights = torch.exp(q @ k.mT - (q @ k.mT).amax(-1, keepdim=True))
    return (weights / weights.sum(-2, keepdim=True)) @ v


def no_maximum(q, k, v):
    weights = torch.exp(q @ k.mT)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def written_between(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    weights[..., 0] = 0
    return (weights / total) @ v


def weights_returned(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v, weights


def sum_returned(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    return (weights @ v) / total, total


def divided_by_the_sum_of_another_row(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1)[:, :, None, :D]


def value_added_to_the_product(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.baddbmm(v, weights, v) / weights.sum(-1, keepdim=True)


def product_written_before_the_division(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out, total = weights @ v, weights.sum(-1, keepdim=True)
    out[..., 0] = 1.0
    return out / total


def features_that_are_exponentials(q, k, v):
    weights = q.exp()
    return (weights @ v[:, :, :D]) / weights.sum(-1, keepdim=True)


def more_than_the_sum(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


def logarithm(q, k, v):
    return torch.log_softmax(q @ k.mT, -1).exp() @ v


def logarithm_in_float32(q, k, v):
    return torch.exp(F.log_softmax(q @ k.mT, dim=-1, dtype=torch.float32)).to(q.dtype) @ v


def softmin(q, k, v):
    return F.softmin(-(q @ k.mT), dim=-1) @ v


def softmin_module(q, k, v):
    return torch.nn.Softmin(-1)(-(q @ k.mT)) @ v


def safe(q, k, v):
    return torch._safe_softmax(q @ k.mT, -1) @ v


def special(q, k, v):
    return torch.special.softmax(q @ k.mT, -1) @ v


def too_little_to_count(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / (weights.sum(-1, keepdim=True) + 1e-12)) @ v


def logarithm_without_gradient(q, k, v):
    with torch.no_grad():
        weights = torch.log_softmax(q @ k.mT, -1)
    return weights.exp() @ v


HIDDEN = torch.ones(N, N).tril(-1) < 1  # the first row sees nothing
SAFE = [torch._safe_softmax, torch.ops.aten._safe_softmax, torch.ops.aten._safe_softmax.default]


def logarithm_of_weights(scores, dim):
    return scores.log_softmax(dim).exp()


def one_more(q, k, v):
    scores = q @ k.mT
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    return weights / (weights.sum(-1, keepdim=True) + (-largest).exp()) @ v


def one_more_and_the_largest_not_below_zero(q, k, v):
    scores = (q @ k.mT).masked_fill(HIDDEN, -torch.inf)
    largest = scores.max(-1, keepdim=True)[0].clamp(min=0)
    weights = torch.exp(scores - largest)
    return weights / (torch.exp(-largest) + weights.sum(-1, keepdim=True)) @ v


def one_more_detached(q, k, v):
    scores = q @ k.mT
    largest = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - largest)
    return (weights @ v) / (torch.exp(-largest) + weights.sum(-1, keepdim=True))


def one_more_where_a_row_sees_nothing(q, k, v):
    scores = (q @ k.mT).masked_fill(HIDDEN, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - largest)
    return weights / (torch.exp(-largest) + weights.sum(-1, keepdim=True)) @ v


def one_more_without_a_shift(q, k, v):
    weights = (q @ k.mT).masked_fill(HIDDEN, -torch.inf).exp()
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


def half_more_after_the_product(q, k, v):
    weights = (q @ k.mT).exp()
    return (weights @ v) / (0.5 + weights.sum(-1, keepdim=True))


def a_score_of_its_own(q, k, v):
    scores, sink = q @ k.mT, q.sum(-1, keepdim=True)
    largest = torch.amax(scores, -1, keepdim=True)
    weights = torch.exp(scores - largest)
    return weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - largest)) @ v


EQUAL = [logarithm, logarithm_in_float32, softmin, softmin_module, safe, special, too_little_to_count]
ONE_MORE = [
    one_more, one_more_and_the_largest_not_below_zero, one_more_detached, one_more_where_a_row_sees_nothing,
    one_more_without_a_shift, half_more_after_the_product, a_score_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize("function", EQUAL, ids=lambda function: function.__name__)
def test_what_equals_a_softmax_is_found(function):
    report, _ = compiled(function, *qkv(), lengths=(0, 2))
    assert [site.score for site in report.sites] == ["s"]
    assert report.missed == []
    for name in ("exp(", "softm"):
        assert name not in report.graph()


@pytest.mark.parametrize("function", ONE_MORE, ids=lambda function: function.__name__)
def test_one_more_in_the_denominator_is_a_sink(function):
    report, _ = compiled(function, *qkv(), lengths=(0, 2))
    (site,) = report.sites
    assert site.score == "s"
    assert any("sink" in note for note in site.notes)
    assert report.missed == []


def name_of(function) -> str:
    """The same in every process, unlike ``str``; an operator of ATen and its overload differ."""
    return (
        str(function)
        if isinstance(function, torch._ops.OperatorBase | torch._ops.OpOverloadPacket)
        else function.__name__
    )


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("softmax", [*SAFE, logarithm_of_weights, torch.special.softmax], ids=name_of)
def test_rows_without_keys(softmax, fill):
    """A safe softmax gives 0 where -inf hides all keys; any other gives NaN."""

    def attention(q, k, v):
        return softmax((q @ k.mT).masked_fill(HIDDEN, fill), -1) @ v

    report, _ = compiled(attention, *qkv())
    nothing = "zero" if softmax in SAFE else "nan"
    assert [site.empty_rows for site in report.sites] == [nothing if fill == -torch.inf else "mean"]
    assert report.missed == []


def test_operators_that_are_not_read_are_named():
    def attention(q, k, v):
        return torch.ops.aten.softmax(q @ k.mT, -1) @ v

    report, _ = compiled(attention, *qkv())
    assert [missed.rule for missed in report.missed] == [Why.OPERATOR]


def added_to_the_sum(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def a_limited_sum(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)) @ v


@pytest.mark.parametrize("function", [added_to_the_sum, a_limited_sum, more_than_the_sum], ids=lambda f: f.__name__)
def test_nearly_a_softmax_is_left_alone_with_the_reason(function):
    report, _ = compiled(function, *qkv())
    assert [missed.rule for missed in report.missed] == [Why.NORMALISER]
    assert report.sites == []


@pytest.mark.parametrize(
    "function",
    [amax, greatest, detached, logsumexp, no_maximum, divided_after_the_product, divided_after_a_cast],
    ids=lambda function: function.__name__,
)
def test_found(function):
    report, _ = compiled(function, *qkv(), lengths=(0, 2))
    assert [site.found_as for site in report.sites] == ["softmax"]
    for name in ("exp", "sum", "amax", "logsumexp"):
        assert f".{name}(" not in report.graph()


def test_another_number_is_data_of_the_score():
    report, _ = compiled(another_maximum, *qkv())
    assert [site.found_as for site in report.sites] == ["softmax"]
    assert ".amax(" in report.graph()


LEFT = [
    another_sum, written_between, weights_returned, more_than_the_sum, sum_returned, divided_by_the_sum_of_another_row,
    features_that_are_exponentials, value_added_to_the_product, product_written_before_the_division,
]  # fmt: skip
GRADIENTS = [
    amax, detached, logsumexp, without_gradient, divided_after_the_product, divided_after_a_cast, sum_without_gradient,
    logarithm, logarithm_without_gradient, softmin, safe, one_more, one_more_and_the_largest_not_below_zero,
    one_more_detached, one_more_without_a_shift, half_more_after_the_product, a_score_of_its_own,
    logsumexp_without_gradient, sum_detached_after_the_product, weights_without_gradient_after_the_product,
]  # fmt: skip


@pytest.mark.parametrize("function", LEFT, ids=lambda function: function.__name__)
def test_the_author_code_stays(function):
    report, _ = compiled(function, *qkv())
    assert report.sites == []
    assert "exp(" in report.graph()
    assert "softmax" not in report.graph()


@pytest.mark.parametrize("function", GRADIENTS, ids=lambda f: f.__name__)
def test_gradients(function):
    torch._dynamo.reset()
    fast = torch.compile(function, backend="effattn", options={"rest": "eager", "strict": True})
    results = []
    for run in (function, fast):
        given = [x.requires_grad_() for x in qkv()]
        out = run(*given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([x.grad for x in given])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_close(actual, expected, 1e-4)


LOG2E = 1.4426950408889634


def powers_of_two(scores):
    weights = torch.exp2(scores)
    return weights / weights.sum(-1, keepdim=True)


def powers_of_two_shifted(scores):
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def powers_of_two_and_one_more(scores):
    weights = torch.exp2(scores)
    return weights / (weights.sum(-1, keepdim=True) + 2)


@pytest.mark.parametrize("fill", [None, -torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize(
    "weigh", [powers_of_two, powers_of_two_shifted, powers_of_two_and_one_more], ids=lambda function: function.__name__
)
def test_powers_of_two(weigh, fill):
    """2 ** (x * log2(e)) is exp(x), also where a mask hides all keys of a row."""

    def attention(q, k, v):
        scores = q @ k.mT * (0.3 * LOG2E)
        return weigh(scores if fill is None else scores.masked_fill(HIDDEN, fill)) @ v

    report, _ = compiled(attention, *qkv())
    (site,) = report.sites
    assert site.score == "0.3*s"


def test_powers_of_two_divided_at_the_end():
    def attention(q, k, v):
        weights = torch.exp2(q @ k.mT)
        return (weights @ v) / weights.sum(-1, keepdim=True)

    report, _ = compiled(attention, *qkv())
    assert len(report.sites) == 1


def test_one_more_of_another_base_is_no_sink_of_powers_of_two():
    def attention(q, k, v):
        scores = q @ k.mT
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp2(scores - largest)
        return weights / (weights.sum(-1, keepdim=True) + torch.exp(-largest)) @ v

    report, _ = compiled(attention, *qkv())
    assert report.sites == []
