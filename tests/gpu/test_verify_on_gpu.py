"""``verify`` on a GPU: the untouched graph beside the other draws the same random numbers, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from small_llama import DEVICE


def dropped(q, k, v):
    place = torch.arange(q.shape[2], device=q.device)
    hidden = (place[None] > place[:, None]) | (place[:, None] - place[None] > 40)
    scores = F.dropout(q, 0.5) @ k.mT * 0.125
    return F.dropout(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v, 0.5)


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_random_numbers_of_the_gpu(rest):
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(2, 4, 300, 64, device=DEVICE, generator=generator) for _ in range(3))
    torch._dynamo.reset()
    torch.manual_seed(3)
    expected = dropped(q, k, v)
    after = torch.rand(3, device=DEVICE)
    fast = torch.compile(dropped, backend="effattn", options={"rest": rest, "strict": True, "verify": True})
    torch.manual_seed(3)
    assert_close(fast(q, k, v), expected, 1e-4)
    assert torch.equal(torch.rand(3, device=DEVICE), after)
