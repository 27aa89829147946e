"""The power and window forms against compiled FlexAttention with the same masks, forward, in one run.

    python -m benchmarks.power_vs_flex --out benchmarks/results/power_vs_flex.json

FlexAttention needs a block mask made beforehand; its seconds are shown apart and are not in its time. effattn makes
none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import effattn
from benchmarks import harness
from benchmarks.harness import EFFATTN

FLEX = "flex_attention"
LENGTHS, TINY_LENGTHS = (32_768, 131_072), (257,)
PARAMS = {"power": {"block": 128, "window": 2048, "sinks": 128}, "window": {"window": 2048, "sinks": 128}}
TINY_PARAMS = {"power": {"block": 16, "window": 64, "sinks": 16}, "window": {"window": 64, "sinks": 16}}
SIZES, TINY_SIZES = {"heads": 32, "kv_heads": 8, "head_dim": 128}, {"heads": 4, "kv_heads": 2, "head_dim": 16}
BLOCK = 128  # FlexAttention's


def inputs(options: argparse.Namespace, sizes: dict[str, int], length: int) -> tuple[torch.Tensor, ...]:
    """query [1, heads, N, D], key and value [1, kv_heads, N, D], the same every time."""
    torch.manual_seed(0)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    heads = (sizes["heads"], sizes["kv_heads"], sizes["kv_heads"])
    return tuple(torch.randn(1, h, length, sizes["head_dim"], device=options.device, dtype=dtype) for h in heads)


def flex(form: str, params: dict[str, int], given: tuple[torch.Tensor, ...], tiny: bool, more: dict) -> Callable:
    """FlexAttention with the mask that defines the form."""
    chosen = effattn.forms()[form]
    definition = partial(chosen.reference, chosen.params(**params))

    def kept(_batch, _head, row, column):
        return definition(row, column) & (column <= row)

    query, device = given[0], given[0].device
    on_gpu = device.type == "cuda"
    start = time.perf_counter()
    mask = create_block_mask(
        kept, None, None, query.shape[2], query.shape[2], device=str(device), BLOCK_SIZE=BLOCK, _compile=on_gpu
    )
    if on_gpu:
        torch.cuda.synchronize(device)
    more["mask_s"] = time.perf_counter() - start
    call = flex_attention if tiny else torch.compile(flex_attention, dynamic=False)
    return lambda: call(*given, block_mask=mask, enable_gqa=True)


def ours(form: str, params: dict[str, int], given: tuple[torch.Tensor, ...]) -> Callable:
    return lambda: effattn.attention(*given, form=form, causal=True, **params)


def some_rows(out: torch.Tensor) -> torch.Tensor:
    """Enough rows to compare: the first and last, and every 61st."""
    return torch.cat([out[:, :, :256], out[:, :, ::61], out[:, :, -256:]], dim=2)


def run(argv: list[str] | None) -> int:
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of 32,768 and 131,072")
    parser.add_argument("--forms", nargs="+", choices=tuple(PARAMS), default=list(PARAMS))
    options = parser.parse_args(argv)
    sizes, params = (TINY_SIZES, TINY_PARAMS) if options.tiny else (SIZES, PARAMS)
    setting: dict[str, Any] = {"batch": 1, "dtype": "float32" if options.tiny else "bfloat16", **sizes, **params}
    suite = harness.Suite("power_vs_flex", options, setting, against=(FLEX,))
    for length in options.lengths or (TINY_LENGTHS if options.tiny else LENGTHS):
        given = inputs(options, sizes, length)
        for form in options.forms:
            case, more = f"{form}, N {length:,}", dict[str, Any]()
            with torch.no_grad():
                built = partial(flex, form, params[form], given, options.tiny, more)
                suite.measure(case, FLEX, built, compare=some_rows, more=more)
                suite.measure(case, EFFATTN, partial(ours, form, params[form], given), compare=some_rows)
            suite.bar(case, EFFATTN, FLEX, 1.0)
    return suite.finish()


if __name__ == "__main__":
    harness.main(run)
