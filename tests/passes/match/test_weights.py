"""What may happen to weights, and to value, on the way to their product."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled

from effattn.ir.refusal import Why

B, H, N, D = 2, 3, 13, 8


def tensors():
    generator = torch.Generator().manual_seed(0)
    seen = torch.ones(B, 1, N, N, dtype=torch.bool).tril()
    seen[0, :, :, :4] = False  # rows that see nothing
    return [*(torch.randn(B, H, N, D, generator=generator) for _ in range(3)), seen]


def weights(q, k, seen):
    return (q @ k.mT * 0.3).masked_fill(~seen, -torch.inf).softmax(-1)


def test_weights_set_to_zero_where_the_scores_were_hidden():
    """What NaN would be in rows that see nothing becomes zero."""

    def call(q, k, v, seen):
        return weights(q, k, seen).masked_fill(~seen, 0.0) @ v

    report, out = compiled(call, *tensors())
    assert len(report.sites) == 1
    assert "softmax" not in report.graph()
    assert (out[0, :, :4] == 0).all()


def test_weights_set_to_zero_elsewhere():
    def call(q, k, v, seen):
        return weights(q, k, seen).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(-1), 0.0) @ v

    report, _ = compiled(call, *tensors())
    assert report.sites == []
    assert report.missed[0].rule == Why.WEIGHTS


def test_weights_set_to_zero_in_place():
    """Either name of what was written to may be read."""

    def old_name(q, k, v, seen):
        found = weights(q, k, seen)
        found.masked_fill_(~seen, 0)
        return found.view(B * H, N, N) @ v.flatten(0, 1)

    def new_name(q, k, v, seen):
        return weights(q, k, seen).masked_fill_(~seen, 0) @ v

    for call in (old_name, new_name):
        report, out = compiled(call, *tensors())
        assert len(report.sites) == 1, report.missed
        assert "softmax" not in report.graph()
        assert (out.view(B, H, N, D)[0, :, :4] == 0).all()


def test_weights_changed_in_place_in_other_ways():
    def by_another_number(q, k, v, seen):
        return weights(q, k, seen).masked_fill_(~seen, 0.5) @ v

    def elsewhere(q, k, v, seen):
        return weights(q, k, seen).masked_fill_(seen, 0) @ v

    def through_a_view(q, k, v, seen):
        found = weights(q, k, seen)
        found.view(B, H * N, N).masked_fill_(~seen.expand(B, H, N, N).reshape(B, H * N, N), 0)
        return found @ v

    def after_a_copy(q, k, v, seen):
        found = weights(q, k, seen)
        copy = found.clone()
        found.masked_fill_(~seen, 0)
        return copy @ v + found.mean()

    for call in (by_another_number, elsewhere, through_a_view, after_a_copy):
        report, _ = compiled(call, *tensors())
        assert report.sites == [], call.__name__


def test_weights_that_nobody_reads_are_no_other_use():
    """Places of captures in the graph are those after what nobody reads has gone."""

    def call(q, k, v, seen):
        (q.float() * 2).abs()
        seen = seen & (k[:, :1, :, 0].unsqueeze(2) < 1)
        found = weights(q, k, seen)
        out = found @ v
        found.sum(1).view(-1)
        return out

    report, _ = compiled(call, *tensors())
    assert len(report.sites) == 1, report.missed
    assert "softmax" not in report.graph()


def test_a_softmax_that_nobody_reads_is_none():
    def call(q, k, v, seen):
        weights(q, k, seen).sum()
        return v * 2

    report, _ = compiled(call, *tensors())
    assert report.sites == report.missed == []


def test_random_numbers_that_nobody_reads_are_still_drawn():
    def call(q, k, v, seen):
        torch.manual_seed(1)
        torch.nn.functional.dropout(weights(q, k, seen), 0.5)
        return torch.rand(3), (q @ k.mT).softmax(-1) @ v

    report, _ = compiled(call, *tensors())
    assert len(report.sites) == 1


def test_random_numbers_made_of_scores_that_nobody_reads_are_still_drawn():
    def call(q, k, v, seen):
        torch.manual_seed(1)
        scores = q @ k.mT
        torch.nn.functional.dropout(scores, 0.5)
        return torch.rand(3), scores.softmax(-1) @ v

    compiled(call, *tensors())


def test_a_gradient_that_is_asked_for_in_passing():
    def call(q, k, v, seen):
        inner = q * 2
        with torch.enable_grad():
            leaf = inner.detach()
            leaf.requires_grad_()
            return weights(leaf, k, seen) @ v

    _, out = compiled(call, *tensors(), verify=False)
    assert out.requires_grad


def test_the_reason_names_the_graph_break():
    def call(q, k, v, seen):
        found = weights(q, k, seen)
        out = found @ v
        if out.nan_to_num().sum().item() > 1e9:
            return out, None
        return out * 2, found

    report, _ = compiled(call, *tensors())
    (missed,) = report.missed
    assert "a graph break: Unsupported Tensor.item() call" in missed.reason
    assert "capture_scalar_outputs = True" in str(missed)


@pytest.mark.parametrize("causal", [False, True])
def test_a_constant_factor_of_value(causal):
    def call(q, k, v):
        scores = q @ k.mT * 0.3
        scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf) if causal else scores
        return scores.softmax(-1) @ (v * 0.7)

    report, _ = compiled(call, *tensors()[:3])
    assert len(report.sites) == 1
    assert report.missed == []


@pytest.mark.parametrize("side", ["query", "key"])
def test_a_scale_that_a_tensor_holds(side):
    def call(q, k, v):
        root = torch.sqrt(torch.tensor(q.shape[-1] * 3, dtype=torch.float))
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        divided = (q / root, k.mT) if side == "query" else (q, k.mT / root.to(dtype=q.dtype))
        scores = torch.bmm(*divided).view(B, H, N, N)
        return torch.bmm(scores.softmax(-1).view(-1, N, N), v)

    report, _ = compiled(call, *tensors()[:3])
    assert report.sites[0].score == "0.20412415*s"


@pytest.mark.parametrize(("p", "training"), [(0.1, False), (0.0, True)])
def test_dropout_in_place_that_does_nothing(p, training):
    """``nn.Dropout(inplace=True)`` in eval()."""
    drop = torch.nn.functional.dropout

    def call(q, k, v):
        scores = drop(q @ k.mT * 0.3, p, training, True)
        return drop(scores.softmax(-1), p, training, inplace=True) @ drop(v * 1, p, training, inplace=True)

    report, _ = compiled(call, *tensors()[:3])
    assert len(report.sites) == 1, report.missed
    assert "softmax" not in report.graph()


def test_dropout_in_place_that_is_live():
    def call(q, k, v):
        torch.manual_seed(0)
        return torch.nn.functional.dropout((q @ k.mT * 0.3).softmax(-1), 0.5, True, inplace=True) @ v

    report, _ = compiled(call, *tensors()[:3])
    assert report.sites == []


def nan_to_num(w, seen):
    return w.nan_to_num(0.0)


def nan_to_num_by_default(w, seen):
    return torch.nan_to_num(w)


def where_nan(w, seen):
    return torch.where(torch.isnan(w), torch.zeros_like(w), w)


def filled_where_nan(w, seen):
    return w.masked_fill(w.isnan(), 0.0)


def where_hidden(w, seen):
    return torch.where(seen, w, 0.0)


CLEARED = [nan_to_num, nan_to_num_by_default, where_nan, filled_where_nan, where_hidden]


@pytest.mark.parametrize("cleared", CLEARED, ids=lambda cleared: cleared.__name__)
def test_rows_that_see_nothing_are_set_to_zero(cleared):
    def call(q, k, v, seen):
        return cleared(weights(q, k, seen), seen) @ v

    report, out = compiled(call, *tensors())
    assert len(report.sites) == 1, report.missed
    assert not any(word in report.graph() for word in ("softmax", "isnan", "nan_to_num"))
    assert (out[0, :, :4] == 0).all()


def nan_to_another_number(w, seen):
    return w.nan_to_num(0.5)


def nan_of_something_else(w, seen):
    return w.masked_fill(seen.float().log().isnan(), 0.0)


def not_nan(w, seen):
    return torch.where(torch.isnan(w), w, 0.0)


@pytest.mark.parametrize("call", [nan_to_another_number, nan_of_something_else, not_nan])
def test_other_uses_of_nan(call):
    report, _ = compiled(lambda q, k, v, seen: call(weights(q, k, seen), seen) @ v, *tensors())
    assert report.sites == []


@pytest.mark.parametrize("fill", [-torch.inf, -1e9], ids=["infinite", "finite"])
@pytest.mark.parametrize("as_float", [False, True])
def test_weights_times_the_mask(fill, as_float):
    """A row of NaN times zero is still NaN."""

    def call(q, k, v, seen):
        w = (q @ k.mT * 0.3).masked_fill(~seen, fill).softmax(-1)
        return (w * (seen.float() if as_float else seen)) @ v

    report, out = compiled(call, *tensors())
    assert len(report.sites) == 1, report.missed
    rows = out[0, :, :4]
    assert rows.isnan().all() if fill == -torch.inf else (rows == 0).all()


def test_weights_times_another_mask():
    def call(q, k, v, seen):
        return (weights(q, k, seen) * torch.ones(N, N).tril(-1)) @ v

    report, _ = compiled(call, *tensors())
    assert report.sites == []


def test_weights_times_a_number():
    def call(q, k, v, seen):
        return (0.5 * (weights(q, k, seen | ~seen) * 3 / 2)) @ v

    report, _ = compiled(call, *tensors())
    assert len(report.sites) == 1, report.missed
    assert "softmax" not in report.graph()
