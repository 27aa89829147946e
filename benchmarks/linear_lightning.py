"""Lightning attention (linear, with decay): the op against fla-core, forward; with gradients up to 512K tokens.

    python -m benchmarks.linear_lightning --out benchmarks/results/linear_lightning.json
    python -m benchmarks.linear_lightning --sweep          # tile sizes and lengths of parts, to fill the table with

fla-core (pip install fla-core) is compared with if it can be imported; on a CPU, in small, the N x N definition is.
Both read the same tensors, heads beside each other in memory as fla has them, with the same decay and scale.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import effattn.runtime.ops.linear  # noqa: F401  (registers the op)
from benchmarks import harness
from benchmarks.harness import EAGER, EFFATTN

FLA, GRAPH = "fla", "effattn in a CUDA graph"
LENGTHS, TINY_LENGTHS = (8192, 32_768, 131_072), (130,)
BOTH_LENGTHS, TINY_BOTH = (8192, 32_768, 131_072, 524_288), (130, 260)
SIZES, TINY_SIZES = {"heads": 32, "head_dim": 128}, {"heads": 2, "head_dim": 16}
LAYER, LAYERS = 0, 8  # what fla's slopes depend on
CHUNKS, WIDTHS, WARPS, STAGES, SPANS = (32, 64, 128), (64, 128), (4, 8), (2, 3), (1024, 2048, 4096)


def inputs(options: argparse.Namespace, sizes: dict[str, int], length: int, grad: bool) -> tuple[Tensor, ...]:
    """query, key, value [1, N, H, D]; queries and keys as small as after a norm."""
    torch.manual_seed(0)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    shape = (1, length, sizes["heads"], sizes["head_dim"])
    made = [torch.randn(shape, device=options.device, dtype=dtype) for _ in range(3)]
    return tuple((tensor * factor).requires_grad_(grad) for tensor, factor in zip(made, (0.1, 0.1, 1.0), strict=True))


def rates(query: Tensor) -> Tensor:
    """fla's slopes, negated: the first head forgets nothing."""
    heads = query.shape[2]
    steps = torch.arange(heads, device=query.device, dtype=torch.float32)
    return -(8 / heads * (1 - LAYER / LAYERS)) * steps


def ours(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    decay = rates(query)

    def run() -> Tensor:
        views = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.ops.effattn.linear(*views, decay, layout="bnhd")[0].transpose(1, 2)

    return run


def fla(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    from fla.ops.lightning_attn import chunk_lightning_attn

    return lambda: chunk_lightning_attn(query, key, value, layer_idx=LAYER, num_layers=LAYERS, scale=1.0)[0]


def definition(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    decay = rates(query)

    def run() -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        place = torch.arange(q.shape[2], device=q.device)
        distance = place[:, None] - place
        weights = torch.exp(decay[:, None, None] * distance.clamp(min=0)).masked_fill(distance < 0, 0.0)
        return (((q @ k.mT) * weights) @ v).transpose(1, 2)

    return run


def with_gradients(build: Callable, given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A function that computes output and gradients, and returns that of the query."""
    forward, weight = build(*given), torch.ones_like(given[2])
    return lambda: torch.autograd.grad(forward(), given, weight)[0]


def captured(build: Callable, given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """The same, recorded once: at few tokens it is the host that takes the time otherwise."""
    run, stream = with_gradients(build, given), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


def some_rows(out: Tensor) -> Tensor:
    """Enough rows to compare: the first and last, and every 61st."""
    return torch.cat([out[:, :256], out[:, ::61], out[:, -256:]], dim=1)


def sweep(suite: harness.Suite, given: tuple[Tensor, ...], case: str) -> None:
    """Every combination of tiles and parts, forward."""
    from effattn.lowering.kernels.linear.spec import LinearTiles
    from effattn.runtime.targets.triton import linear as linear_triton

    views = [tensor.transpose(1, 2) for tensor in given]
    decay, out = rates(given[0]), torch.empty_like(given[2]).transpose(1, 2)
    for sizes in itertools.product(CHUNKS, WIDTHS, WARPS, STAGES):
        for span in SPANS:
            tiles = LinearTiles(*sizes)

            def run(tiles=tiles, span=span) -> Tensor:
                linear_triton.run(*views, decay, None, out, scale=1.0, causal=True, tiles=tiles, span=span)
                return out.transpose(1, 2)

            suite.measure(case, f"{tiles}, parts of {span}", lambda run=run: run, compare=some_rows)


def run(argv: list[str] | None) -> int:
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", help="forward, instead of 8K, 32K and 131K")
    parser.add_argument("--both-lengths", type=int, nargs="+", help="with gradients, instead of 8K to 512K")
    parser.add_argument("--sweep", action="store_true", help="also time every tile size and length of parts, forward")
    options = parser.parse_args(argv)
    sizes = TINY_SIZES if options.tiny else SIZES
    on_gpu = torch.device(options.device).type == "cuda"
    has_fla = on_gpu and importlib.util.find_spec("fla") is not None
    peers: dict[str, Callable] = {FLA: fla} if has_fla else {EAGER: definition} if options.tiny else {}
    setting: dict[str, Any] = {"batch": 1, "dtype": "float32" if options.tiny else "bfloat16", **sizes}
    suite = harness.Suite("linear_lightning", options, setting, against=tuple(peers))
    if not has_fla:
        suite.note("fla-core is not compared with: " + ("it is not installed" if on_gpu else "it needs a GPU"))
    for length in options.lengths or (TINY_LENGTHS if options.tiny else LENGTHS):
        case, given = f"forward, N {length:,}", inputs(options, sizes, length, False)
        with torch.no_grad():
            for name, build in {**peers, EFFATTN: ours}.items():
                suite.measure(case, name, partial(build, *given), compare=some_rows)
            if options.sweep:
                sweep(suite, given, case)
        suite.bar(case, EFFATTN, FLA, 0.8)
    lengths = options.both_lengths or (TINY_BOTH if options.tiny else BOTH_LENGTHS)
    ways = {EFFATTN: partial(with_gradients, ours)} | ({GRAPH: partial(captured, ours)} if on_gpu else {})
    for name, way in (ways | {name: partial(with_gradients, build) for name, build in peers.items()}).items():
        case = f"forward and backward, {name}"
        for length in lengths:
            given = inputs(options, sizes, length, True)
            row = suite.measure(case, f"{name}, N {length:,}", partial(way, given), compare=None)
            if row is not None and row.ms is not None:
                row.more["ns per token"] = row.ms * 1e6 / length
            del given
    case = f"forward and backward, {GRAPH}"
    first, *others = (f"{GRAPH}, N {length:,}" for length in lengths)
    for other in others if on_gpu else ():  # flat: neither dearer nor cheaper by more than a tenth
        suite.bar(case, other, first, 1.1, "ns per token")
        suite.bar(case, first, other, 1.1, "ns per token")
    return suite.finish()


if __name__ == "__main__":
    harness.main(run)
