"""Attention of many masks and scores against SDPA's and FlexAttention's kernels, forward and backward.

This is ``effattn bench`` over a fixed grid, with what every case has to reach.

    python -m benchmarks.kernels --out benchmarks/results/kernels.json
    python -m benchmarks.kernels --only "documents,window"      # cases whose name holds one of these

FlexAttention's block masks are made beforehand and are in no figure.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import sympy
import torch

from benchmarks import harness
from effattn.bench.mods import MASKS, SCORES, chosen, fields
from effattn.bench.peers import EFFATTN, PEERS, Given
from effattn.bench.problem import Mod, Pairs, Problem
from effattn.bench.run import BACKWARD, FORWARD, parts_of, ready
from effattn.ir import expr
from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.lowering.forms import FORMS
from effattn.runtime.selection.block_map import Wanted

FLEX, FLASH, CUDNN, PLAIN = "FlexAttention", "SDPA flash", "SDPA cuDNN", "SDPA cuDNN, plain causal"
ON_CPU = ("SDPA", "eager")
SIZES, TINY_SIZES = {"batch": 1, "heads": 32, "kv_heads": 8}, {"batch": 2, "heads": 4, "kv_heads": 2}
TINY_TOKENS, TINY_HEAD_DIM, TINY_NUMBER = 70, 16, 30
WINDOW_FORM = "window with sinks"  # effattn's form, with its default parameters


@dataclass(frozen=True)
class Target:
    """What effattn may cost at most on one attention, over the best of ``against``."""

    mask: str
    score: str
    tokens: int
    head_dim: int
    direction: str
    against: tuple[str, ...]
    at_most: float


def _targets(direction: str, rows: tuple[tuple[str, str, tuple[int, ...], int, str, float], ...]) -> list[Target]:
    return [
        Target(mask, score, n, head_dim, direction, (CUDNN, FLASH) if against == CUDNN else (against,), at_most)
        for mask, score, tokens, head_dim, against, at_most in rows
        for n in tokens
    ]


LONG = (32_768, 131_072)
MAP_TOKENS, MAP_BLOCKS, MAP_AT_MOST = 131_072, (128, 128), 0.1  # ms
TARGETS = [
    *_targets(
        FORWARD,
        (
            ("causal", "none", (8192, *LONG), 128, CUDNN, 0.95),
            ("causal", "none", (32_768,), 64, CUDNN, 0.95),
            ("causal", "none", (32_768,), 256, CUDNN, 1.0),
            ("padding:4096", "none", (32_768,), 128, PLAIN, 1.0),
            ("documents:5000", "none", (32_768,), 128, FLEX, 0.75),
            ("window:1024", "none", (32_768,), 128, FLEX, 0.7),
            ("causal", "softcap:30", (32_768,), 128, FLEX, 0.45),
            ("causal", "alibi", (32_768,), 128, FLEX, 0.7),
            ("causal", "table", (32_768,), 128, FLEX, 0.8),
            ("power", "none", LONG, 128, FLEX, 0.65),
            ("power", "none", LONG, 64, FLEX, 0.85),
            (WINDOW_FORM, "none", LONG, 128, FLEX, 0.65),
            (WINDOW_FORM, "none", LONG, 64, FLEX, 0.85),
        ),
    ),
    *_targets(
        BACKWARD,
        (
            ("causal", "none", (32_768,), 128, CUDNN, 1.1),
            ("padding:4096", "none", (32_768,), 128, FLEX, 0.85),
            ("documents:5000", "none", (32_768,), 128, FLEX, 0.85),
            ("window:1024", "none", (32_768,), 128, FLEX, 0.85),
            ("causal", "alibi", (32_768,), 128, FLEX, 0.85),
            ("causal", "softcap:30", (32_768,), 128, FLEX, 0.5),
            ("power", "none", LONG, 128, FLEX, 0.6),
            ("causal", "learned-table", (8192,), 128, FLEX, 0.7),
        ),
    ),
]


def problem(target: Target, options: argparse.Namespace) -> Problem:
    """The attention of a target; a small one for ``--tiny``."""
    mask, score, tokens, head_dim = target.mask, target.score, target.tokens, target.head_dim
    if options.tiny:
        mask = f"{mask.partition(':')[0]}:{TINY_NUMBER}" if ":" in mask else mask
        tokens, head_dim = TINY_TOKENS, TINY_HEAD_DIM
    sizes: dict[str, Any] = {**(TINY_SIZES if options.tiny else SIZES), "tokens": tokens, "head_dim": head_dim}
    named = "causal" if mask == WINDOW_FORM else mask
    asked = fields(chosen("mask", named, MASKS, _no_code), chosen("score", score, SCORES, _no_code))
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    made = Problem(**sizes, dtype=dtype, device=options.device, **asked)
    if mask != WINDOW_FORM:
        return made
    form = FORMS["window"]
    keep = partial(form.reference, form.params())
    mod = Mod(lambda b, h, q, k: (k <= q) & keep(q, k), by_batch=False, by_head=False)
    return replace(made, mask=mask, make_mask=lambda _: mod, form=("window", {}), causal=None)


def _no_code(name: str) -> Any:
    raise AssertionError(name)


def case_of(one: Problem, target: Target) -> str:
    return f"{one.name}, D {one.head_dim}, {target.direction}"


def measure(suite: harness.Suite, target: Target) -> None:
    """effattn and those that the target names; on a CPU, those that it has."""
    one = problem(target, suite.options)
    case, pairs = case_of(one, target), Pairs.of(one, one.make_mask(one))
    given = Given(one, one.make_mask(one), one.make_score(one), target.direction == BACKWARD)
    names = target.against if given.on_gpu else ON_CPU
    peers = [peer for peer in (PEERS[EFFATTN], *(PEERS[name] for name in names)) if peer.why_not(given) is None]

    def compared(results: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([part.flatten() for part in parts_of(one, pairs, results)])

    makers = {peer.name: partial(ready, given, peer) for peer in peers}
    suite.measure_in_turns(case, makers, {peer.name: compared for peer in peers if peer.same})
    suite.bar(case, EFFATTN, target.against, target.at_most)


def block_map(suite: harness.Suite) -> None:
    """The map of blocks of packed documents, which FlexAttention's create_block_mask would make of all pairs."""
    target = Target("documents:5000", "none", MAP_TOKENS, 128, FORWARD, (), 0.0)
    one = problem(target, suite.options)
    document = torch.arange(one.tokens, device=one.device).div(TINY_NUMBER if suite.options.tiny else 5000).long()[None]
    same = expr.load("document", [expr.b, expr.q], integer=True) - expr.load("document", [expr.b, expr.k], integer=True)
    spec = AttentionSpec(
        expr.s, sympy.And(expr.k <= expr.q, sympy.Eq(same, 0)), captures=(CaptureSpec("document", "int64", 2),)
    )
    sizes, device = (one.batch, one.heads, one.tokens, one.tokens), torch.device(one.device)
    document = document.expand(one.batch, -1).contiguous()
    make = partial(maker(device), Wanted(spec, sizes, [document], [], [], *MAP_BLOCKS, device))
    case = f"block map, {one.name}"
    suite.measure(case, EFFATTN, lambda: make, compare=None)
    suite.bar(case, EFFATTN, (), MAP_AT_MOST)


def maker(device: torch.device) -> Any:
    """What makes a block map there."""
    from effattn.runtime.selection import block_map as in_torch
    from effattn.runtime.selection import triton_block_map

    return in_torch.block_map if device.type == "cpu" else triton_block_map.block_map


def run(argv: list[str] | None) -> int:
    parser = harness.parser(__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="cases whose name holds one of these words, separated by commas")
    options = parser.parse_args(argv)
    options.tiny = options.tiny or options.device == "cpu"
    setting = {**(TINY_SIZES if options.tiny else SIZES), "dtype": "float32" if options.device == "cpu" else "bfloat16"}
    against = ON_CPU[1:] if options.device == "cpu" else (FLEX, CUDNN, PLAIN)
    suite = harness.Suite("kernels", options, setting, against)
    seen: set[str] = set()
    for target in TARGETS:
        case = case_of(problem(target, options), target)
        wanted = options.only is None or any(word.strip() in case for word in options.only.split(","))
        if wanted and case not in seen:
            seen.add(case)
            measure(suite, target)
    if options.only is None or "block map" in options.only:
        block_map(suite)
    return suite.finish()


if __name__ == "__main__":
    harness.main(run)
