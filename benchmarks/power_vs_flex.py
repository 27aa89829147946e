"""The power form against compiled FlexAttention with the same mask, forward, in one run.

    python -m benchmarks.power_vs_flex --out benchmarks/results/power_vs_flex.json

FlexAttention needs a block mask made beforehand; its seconds are shown apart and are not in its time. effattn makes
none.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import effattn
from benchmarks import harness

LENGTHS = (32_768, 131_072)
LARGE = {"block": 128, "window": 2048, "sinks": 128}
TINY = {"block": 16, "window": 64, "sinks": 16}


def tensors(heads: int, kv_heads: int, length: int, dim: int, options: Any) -> tuple[torch.Tensor, ...]:
    """query [1, heads, N, D], key and value [1, kv_heads, N, D], the same every time."""
    torch.manual_seed(0)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    return tuple(
        torch.randn(1, count, length, dim, device=options.device, dtype=dtype) for count in (heads, kv_heads, kv_heads)
    )


def flex(query: Any, key: Any, value: Any, params: dict[str, int], device: str, more: dict[str, Any]) -> Any:
    """FlexAttention on the mask that defines the form."""
    form = effattn.forms()["power"]
    reference = partial(form.reference, form.params(**params))

    def mask(_batch, _head, row, column):
        return reference(row, column) & (column <= row)

    length = query.shape[2]
    start = time.perf_counter()
    blocks = create_block_mask(mask, None, None, length, length, device=device, _compile=device == "cuda")
    if device == "cuda":
        torch.cuda.synchronize()
    more["mask_s"] = time.perf_counter() - start
    call = torch.compile(flex_attention, dynamic=False)
    return lambda: call(query, key, value, block_mask=blocks, enable_gqa=True)


def ours(query: Any, key: Any, value: Any, params: dict[str, int]) -> Any:
    return lambda: effattn.attention(query, key, value, form="power", causal=True, **params)


def run() -> int:
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+")
    options = parser.parse_args()
    heads, kv_heads, dim = (4, 2, 16) if options.tiny else (32, 8, 128)
    params = TINY if options.tiny else LARGE
    setting = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "dtype": "bfloat16", "batch": 1, **params}
    suite = harness.Suite("power_vs_flex", options, setting)
    for length in options.lengths or ((257, 512) if options.tiny else LENGTHS):
        inputs = tensors(heads, kv_heads, length, dim, options)
        more: dict[str, Any] = {}
        with torch.no_grad():
            case = f"N {length}"
            suite.measure(
                case, "flex_attention", partial(flex, *inputs, params, options.device, more), compare=_rows, more=more
            )
            suite.measure(case, "effattn", partial(ours, *inputs, params), compare=_rows)
    return suite.finish(against=("flex_attention",))


def _rows(out: torch.Tensor) -> torch.Tensor:
    """Enough rows to compare: the first and last blocks, and every 61st."""
    return torch.cat([out[:, :, :256], out[:, :, ::61], out[:, :, -256:]], dim=2)


if __name__ == "__main__":
    harness.main(run)
