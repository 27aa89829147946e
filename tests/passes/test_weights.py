"""What may happen to weights, and to value, on the way to their product."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled

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
    assert "another mask" in report.missed[0].reason


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
