"""A Hugging Face prefill: eager, torch.compile with Inductor, torch.compile with effattn.

    python -m benchmarks.prefill_llama --out benchmarks/results/prefill_llama.json

Four kinds of call: with no attention_mask, with one that is all ones (what a tokenizer returns), a batch of two with
the shorter sequence padded on the left, and documents packed into one sequence, whose positions start anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import harness, llama
from benchmarks.harness import EAGER, EFFATTN, INDUCTOR

NO_MASK, ONES, PADDED, PACKED = "no mask", "mask of ones", "left padding", "packed documents"
KINDS = (NO_MASK, ONES, PADDED, PACKED)
DOCUMENT = 5000  # tokens of one of the packed documents
AT_MOST = {NO_MASK: 0.32, ONES: 0.33, PADDED: 0.30}  # of Inductor's time, 65,536 tokens
BACKENDS = (EAGER, INDUCTOR, EFFATTN)
# the most telling first: the time on a lent machine may end
CASES = (
    (NO_MASK, 65_536),
    (ONES, 65_536),
    (PADDED, 65_536),
    (PACKED, 32_768),
    (NO_MASK, 32_768),
    (NO_MASK, 8192),
    (ONES, 32_768),
    (ONES, 8192),
    (PADDED, 32_768),
    (PADDED, 8192),
)
TINY_CASES = ((NO_MASK, 64), (ONES, 64), (PADDED, 48), (PACKED, 64))


def inputs(options: argparse.Namespace, kind: str, length: int) -> dict[str, Any]:
    """Keyword arguments of one call."""
    ids = llama.tokens(options, 2 if kind == PADDED else 1, length)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    if kind in (ONES, PADDED):
        given["attention_mask"] = torch.ones_like(ids)
    if kind == PADDED:
        given["attention_mask"][1:, : length // 4] = 0
    if kind == PACKED:
        document = min(DOCUMENT, length // 3)
        given["position_ids"] = (torch.arange(length, device=ids.device) % document)[None]
    return given


def prefill(function: Any, given: dict[str, Any]) -> Callable[[], torch.Tensor]:
    def run():
        with torch.no_grad():
            return function(**given).logits

    return run


def bars(suite: harness.Suite, case: str, kind: str, length: int) -> None:
    """What has to be reached."""
    if length == 65_536:
        suite.bar(case, EFFATTN, INDUCTOR, AT_MOST[kind])
        suite.bar(case, EFFATTN, EAGER, 1.0, "peak_gib")
        if kind != PADDED:
            suite.bar(case, EFFATTN, EAGER, 0.86)
    elif kind == NO_MASK:
        suite.bar(case, EFFATTN, (EAGER, INDUCTOR), 1.0)


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    for kind, length in TINY_CASES if options.tiny else CASES:
        if (not options.kinds or kind in options.kinds) and (not options.lengths or length in options.lengths):
            yield kind, length


def run(argv: list[str] | None) -> int:
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", help="only these")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="only these")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    options = parser.parse_args(argv)
    cases = list(chosen(options))
    setting = {**llama.setting(options), "logits_to_keep": 1, "use_cache": False}
    suite = harness.Suite("prefill_llama", options, setting, against=(EAGER, INDUCTOR))
    model = llama.model(options, positions=max(length for _, length in cases))
    for kind, length in cases:
        case, given = f"{kind}, N {length:,}", inputs(options, kind, length)
        for backend in options.backends:
            suite.measure(case, backend, lambda: prefill(suite.compiled(model, backend), given))  # noqa: B023
        bars(suite, case, kind, length)
    return suite.finish()


if __name__ == "__main__":
    harness.main(run)
