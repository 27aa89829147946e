"""One decode step over a static cache that is mostly empty: Inductor against effattn.

    python -m benchmarks.decode_static --out benchmarks/results/decode_static.json

A mask over the whole cache makes a step read every slot. effattn reads the mask as "up to the cache's length", a number
that lives on the device, and touches only what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness, llama
from benchmarks.harness import EAGER, EFFATTN, INDUCTOR

SLOTS, LIVE = (131_072, 1024, 32_768), 800
TINY_SLOTS, TINY_LIVE = (64,), 20
GRAPHS = "reduce-overhead"


def filled_cache(model: Any, ids: torch.Tensor, slots: int) -> Any:
    """A StaticCache of ``slots`` slots after an eager prefill of ``ids``."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=slots)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def step(model: Any, function: Any, ids: torch.Tensor, slots: int) -> Callable[[], torch.Tensor]:
    """A function that decodes one more token, from a cache of its own. The cache grows by one at every call."""
    cache, token = filled_cache(model, ids, slots), ids[:, -1:].clone()

    def run():
        with torch.no_grad():
            return function(token, past_key_values=cache).logits

    return run


def variants(suite: harness.Suite, model: Any) -> dict[str, Callable[[], Any]]:
    """Name -> what makes the function that is called at every step."""
    made: dict[str, Callable[[], Any]] = {EAGER: lambda: model}
    for backend in (INDUCTOR, EFFATTN):
        made[backend] = lambda backend=backend: suite.compiled(model, backend)
        made[graphed(backend)] = lambda backend=backend: suite.compiled(model, backend, mode=GRAPHS)
    return made


def graphed(backend: str) -> str:
    return f"{backend}, CUDA graph"


def measure(suite: harness.Suite, model: Any, slots: int, live: int) -> None:
    """Every variant over one size of cache."""
    case = f"{slots:,} slots, {live} live"
    ids = llama.tokens(suite.options, 1, live)
    for name, make in variants(suite, model).items():
        suite.measure(case, name, lambda make=make: step(model, make(), ids, slots))
    suite.bar(case, EFFATTN, INDUCTOR, 1.0)
    suite.bar(case, graphed(EFFATTN), graphed(INDUCTOR), 1.0)


def run(argv: list[str] | None) -> int:
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--slots", type=int, nargs="+")
    parser.set_defaults(repeats=50)
    options = parser.parse_args(argv)
    slots, live = (TINY_SLOTS, TINY_LIVE) if options.tiny else (SLOTS, LIVE)
    slots = tuple(options.slots or slots)
    against = (INDUCTOR, graphed(INDUCTOR))
    suite = harness.Suite("decode_static", options, {**llama.setting(options), "live": live}, against)
    model = llama.model(options, positions=max(slots))
    for count in slots:
        measure(suite, model, count, live)
    return suite.finish()


if __name__ == "__main__":
    harness.main(run)
