"""A sample of the zoo: one architecture for each way to write attention; `make zoo` runs all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from building import names
from coverage import page
from trial import Trial, run
from watching import watched

# architecture, attention, setting, sites
SAMPLE = [
    ("llama", "eager", "left", 2),
    ("gpt_oss", "eager", "whole", 2),
    ("deepseek_v3", "sdpa", "left", 2),
    ("clip", "eager", "whole", 4),
    ("swin", "eager", "whole", 2),
    ("whisper", "sdpa", "whole", 6),
    ("t5", "eager", "left", 6),
    ("mixtral", "eager", "right", 2),
    ("llama4_text", "eager", "whole", 2),
    ("diffllama", "eager", "whole", 4),
]


@pytest.mark.parametrize(("name", "attention", "setting", "sites"), SAMPLE, ids=lambda value: str(value))
def test_found_read_and_unchanged(name, attention, setting, sites):
    trial = run(name, attention, setting)
    assert trial.verdict == "right", trial
    assert trial.sites == sites


def test_many_architectures_are_known():
    assert len(names()) > 300


def test_attentions_are_counted_apart_from_other_softmaxes():
    def call(x):
        routed = F.softmax(x.mean(-1), dim=-1).topk(2).values
        weights = F.dropout(torch.softmax(x @ x.mT, -1), 0.1, training=False).to(x.dtype)
        out = torch.matmul(weights.view(2, 5, 5), x) + F.scaled_dot_product_attention(x[None], x[None], x[None])[0]
        return out, routed

    _, seen = watched(call, {"x": torch.randn(2, 5, 8)})
    assert (seen.sites, seen.sdpa, seen.softmaxes, seen.other) == (2, 1, 1, 2)


def test_verdicts():
    right = Trial("a", "eager", "whole", sites=2, found=2, difference=0.0)
    assert right.verdict == "right"
    assert Trial("a", "eager", "whole", sites=2, found=1, difference=0.0).verdict == "unseen"
    assert Trial("a", "eager", "whole", sites=2, found=1, refused=1, difference=0.0).verdict == "refused"
    assert Trial("a", "eager", "whole", sites=2, found=2, difference=0.1).verdict == "differs"
    assert Trial("a", "eager", "whole", sites=2, found=2, difference=float("nan")).verdict == "differs"
    text = page([{**right.to_dict(), "reasons": ["2 x because"]}], "5")
    assert "1 architectures with attention" in text
    assert "- because: a" in text
    assert "ended with 1" in page([Trial("b", "eager", "whole", error="ended with 1").to_dict()], "5")
