"""Found, replaced and left alone are three numbers, in the text, the JSON and the page."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

import effattn


def four(q, k, v):
    """Replaced; found, and as it is already; missed; no attention."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(9, 9, dtype=torch.bool).tril())
    x = x + F.scaled_dot_product_attention(q, k, v)
    x = x + torch.sigmoid(q @ k.mT) @ v
    return x * torch.softmax(x.mean(-1, keepdim=True), -1)


def test_three_numbers():
    torch._dynamo.reset()
    report = effattn.explain(four, *torch.randn(3, 2, 3, 9, 8), options={"rest": "eager"})
    counts = report.counts
    assert (counts.found, counts.replaced, counts.missed, counts.outside) == (2, 1, 1, 0)
    assert (counts.total, counts.left_alone) == (3, 2)
    assert [site.replaced for site in report.sites] == [True, False]
    assert report.to_dict()["counts"] == {
        "found": 2, "replaced": 1, "missed": 1, "outside": 0, "total": 3, "left_alone": 2
    }  # fmt: skip
    text = str(report)
    assert text.startswith("effattn: 2 of 3 attention sites found, 1 replaced, 2 left alone, policy 'exact'")
    assert "\n  left alone: " in text
    assert "\n  not attention: " in text
    assert "\n    because of " in text


def test_the_page_has_them_too(tmp_path):
    torch._dynamo.reset()
    report = effattn.explain(four, *torch.randn(3, 2, 3, 9, 8), options={"rest": "eager"})
    page = report.to_html(tmp_path / "report.html").read_text()
    assert "2 attentions found, 1 replaced, 2 left alone" in re.sub(r"\s+", " ", page)


def test_where_all_is_replaced_nothing_is_left():
    torch._dynamo.reset()
    report = effattn.explain(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *torch.randn(3, 2, 3, 9, 8))
    assert str(report).startswith("effattn: 1 of 1 attention sites found, 1 replaced, policy 'exact'")
