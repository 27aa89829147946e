"""How chunks of queries become strips: by widths and distances of their runs alone."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from plans import CASES, Sizes, tensors

from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import portable
from effattn.runtime.targets.chunks import Chunk, Run
from effattn.runtime.targets.portable import flash
from effattn.runtime.targets.portable.call import Call
from effattn.runtime.targets.portable.strips import Keys, Strip, causal, strips


def chunk(start, *runs):
    """16 queries; runs as (start, stop) with a True if every query sees all."""
    return Chunk(start, start + 16, tuple(Run(*run) for run in runs))


def shown(chunks, most=8, is_diagonal=lambda strip: True):
    return list(strips(causal(chunks, is_diagonal), lambda chunk: most))


def test_a_window_that_slides_is_one_strip():
    chunks = [chunk(64 + 16 * i, (16 * i, 16 * i + 16, False), (16 * i + 16, 16 * i + 64, True)) for i in range(5)]
    assert shown(chunks, 8, lambda strip: False) == [Strip(64, 16, 5, (Keys(0, 16, False, 16), Keys(16, 48, True, 16)))]
    assert [strip.chunks for strip in shown(chunks, 2, lambda strip: False)] == [2, 2, 1]


def test_runs_at_other_distances_or_widths_end_a_strip():
    found = shown([chunk(16 * i, (at, at + 8, True)) for i, at in enumerate((0, 8, 16, 25, 34))])
    assert [(strip.start, strip.chunks, strip.keys[0].step) for strip in found] == [(0, 3, 8), (48, 2, 9)]
    found = shown([chunk(16 * i, (0, 8 + i // 2, True)) for i in range(4)])
    assert [strip.chunks for strip in found] == [2, 2]
    found = shown([chunk(0, (16, 24, True)), chunk(16, (8, 16, True))])  # a view cannot go back
    assert [strip.chunks for strip in found] == [1, 1]


def growing(count, first=0, keys=0):
    """Chunks that see all keys from ``keys`` on before them, and their own causally."""
    for i in range(count):
        at = first + 16 * i
        before = [(keys, at, True)] if at > keys else []
        yield chunk(at, *before, (at, at + 16, False))


def test_chunks_that_see_more_and_more_are_one():
    assert shown(growing(4)) == [Strip(0, 64, 1, (Keys(0, 64, False, causal=True),))]
    assert shown(growing(3, 32, 8)) == [Strip(32, 48, 1, (Keys(8, 24, True), Keys(32, 48, False, causal=True)))]
    assert len(shown(growing(4), is_diagonal=lambda strip: strip.start != 16)) == 3


def test_a_causal_chunk_is_a_strip_of_its_own():
    """Also beside others of its size: a document of two chunks, and one with as many queries that is masked."""
    masked = Chunk(32, 64, (Run(32, 64, False),))
    found = shown([*growing(2), masked], is_diagonal=lambda strip: strip.rows == 16)
    assert [(strip.start, strip.chunks, strip.diagonal is None) for strip in found] == [(0, 1, False), (32, 1, True)]


def test_what_only_looks_causal_is_not_joined():
    """Tested keys elsewhere than after those before, or keys that are not seen any more."""
    elsewhere = [chunk(0, (0, 16, False)), chunk(16, (0, 16, True), (32, 48, False))]
    lost = [chunk(16, (0, 16, True), (16, 32, False)), chunk(32, (8, 32, True), (32, 48, False))]
    for chunks in (elsewhere, lost):
        assert all(keys.causal is False for strip in shown(chunks) for keys in strip.keys)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("causal", 1, 1), ("left_padding", 2, 4), ("window", 2, 5), ("window_and_sinks", 2, 5), ("documents", 17, 40)],
)
def test_how_many_calls(name, least, most, small_strips):
    """A causal call is one of the kernel's own, and so is each of 17 documents; padding adds those of its border."""
    sizes = Sizes(
        batch=1 + (name == "left_padding"), heads=2, kv_heads=1, q_len=320, k_len=320, head_dim=8, value_dim=8
    )
    given, made = CASES[name](sizes, torch.device("cpu")), tensors(sizes)
    call = Call(given.plan, *made, given.captures, given.scalars, given.numbers)
    assert least <= sum(1 for _ in flash.work(call)) <= most
    out, _ = portable.run(given.plan, *made, given.captures)
    assert_close(out, reference(given.plan, *made, given.captures)[0], exact_dtype=False)
