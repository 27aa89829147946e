"""Attention as it is written outside transformers: each row found and read, or left alone with its reason.

Every row runs in CI without gradients; those of ``WITH_GRADIENTS`` with them too, with symbolic lengths. The others are
marked slow: ``make zoo`` runs them, or ``pytest -m slow tests/wild``.
"""

from __future__ import annotations

import diffusion
import images
import language
import layouts
import masking
import modules
import positions
import proteins
import pytest
import softmaxes
import variants
import windows
from row import Row, check

MODULES = (images, windows, language, variants, positions, proteins, softmaxes, diffusion, masking, modules, layouts)
ROWS = [row for module in MODULES for row in module.ROWS]
# one row of each kind: ways to make scores, to mask, to place heads, to leave attention alone
WITH_GRADIENTS = {
    *("vit-normed", "swin-shifted", "SwinV2", "Sam", "Axial", "neighbours-2d", "perceiver-padded", "windows-split"),
    *("nanogpt", "llama-reference-later", "whisper", "x-transformers-one-kv-head", "x-transformers-memories-padded"),
    *("T5", "TransformerXl", "TiedRows", "x-transformers-sink", "differential-outputs", "GptOss", "mla", "Fairseq"),
    *("PairBias", "softmax-by-exp", "talking-linear", "baddbmm-mask", "VaeBlock", "Joint", "float-from-caller-eager"),
    *("by_lengths", "stacked", "mha-both", "transformer-padded", "grouped-eager", "groups_apart", "192-and-128"),
    *("fewer-queries",),
}


def test_names_are_unique():
    names = [str(row) for row in ROWS]
    assert len(set(names)) == len(names)
    assert set(names) > WITH_GRADIENTS


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_found_read_and_unchanged(row: Row):
    check(row, train=False)


def sampled(row: Row):
    return pytest.param(row, marks=() if str(row) in WITH_GRADIENTS else pytest.mark.slow, id=str(row))


@pytest.mark.parametrize("row", [sampled(row) for row in ROWS if row.train])
def test_gradients_with_symbolic_lengths(row: Row):
    check(row, train=True)
