"""Time of a call on the host: how long a small attention keeps the processor, beside SDPA.

    python -m benchmarks.host --out benchmarks/results/host.json

On a GPU the device keeps up with these sizes, so the loop takes what the host takes. On a CPU kernels are prepared and
their start is left out; what remains is effattn's own part, which is all that one can change here.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness

SDPA, OP, CALL, EXACT = "SDPA", "effattn, op", "effattn.attention", "effattn, op, SDPA's kernel"
COMPILED, COMPILED_SDPA = "effattn, compiled", "SDPA, compiled"
CASES = {  # name -> (batch, heads, key heads, queries, keys, head_dim)
    "forward": (1, 8, 2, 128, 128, 64),
    "decode": (1, 8, 2, 1, 512, 64),
    "forward and backward": (1, 8, 2, 128, 128, 64),
}
ON_CPU = (1, 4, 2, 16, 16, 16)  # SDPA computes there while the host waits, so as little as possible
ROUNDS, CALLS, TINY_CALLS = 20, 200, 20
AT_MOST = 3.2  # times SDPA's: 60 us beside 19


def microseconds(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """The fastest of some rounds of calls, per call; the device is idle before each round."""
    for _ in range(10):
        function()
    fastest = float("inf")
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        fastest = min(fastest, time.perf_counter() - start)
    return 1e6 * fastest / calls


@contextlib.contextmanager
def started_by_nobody(device: torch.device) -> Iterator[None]:
    """On a CPU: generated kernels are prepared, and not started."""
    from effattn.runtime import kernels, launching

    if device.type == "cuda":
        yield
        return
    load, changed = kernels.load, []

    def prepared(spec: Any) -> Any:
        kernel = load(spec)
        changed.append((kernel.module, kernel.module.start))
        kernel.module.start = lambda known, kernel, grid, *arguments, **options: None
        return kernel

    kernels.load = prepared  # type: ignore[assignment]
    launching.forget()
    try:
        yield
    finally:
        kernels.load = load
        for module, start in reversed(changed):
            module.start = start
        launching.forget()


def tensors(options: Any, sizes: tuple[int, ...], grad: bool) -> list[Tensor]:
    batch, heads, kv_heads, q_len, k_len, dim = sizes
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, dim))
    return [torch.randn(shape, device=options.device, dtype=dtype).requires_grad_(grad) for shape in shapes]


def variants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    import effattn
    import effattn.runtime.ops  # registers torch.ops.effattn
    from effattn.functional import _plan
    from effattn.ir.plan import Plan

    window = Plan.decode(_plan("window", True, (("window", 64),), False)).dispatched(target="triton").encode()
    exact = _plan("exact", True, (), False)
    attend = torch.ops.effattn.attend.default
    causal = q.shape[2] > 1

    def user(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
        apart = rows[:, None] + keys.shape[0] - rows.shape[0] - keys
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(apart >= 0) & (apart < 64), enable_gqa=True)

    options = {"strict": True, "inner_backend": "eager", "target": "triton"}
    compiled = torch.compile(user, backend=harness._effattn(), options=options, dynamic=False)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    in_graph = torch.compile(plain, backend="eager", dynamic=False)
    return {
        SDPA: lambda: plain(q, k, v),
        COMPILED_SDPA: lambda: in_graph(q, k, v),
        OP: lambda: attend(q, k, v, [], [], [0.125], window)[0],
        EXACT: lambda: attend(q, k, v, [], [], [0.125], exact)[0],
        CALL: lambda: effattn.attention(q, k, v, form="window", window=64),
        COMPILED: lambda: compiled(q, k, v),
    }


def measure(suite: harness.Suite, case: str) -> None:
    grad = "backward" in case
    on_gpu = suite.device.type == "cuda"
    made = tensors(suite.options, CASES[case] if on_gpu else ON_CPU, grad)
    upstream = torch.randn_like(made[0])
    calls = TINY_CALLS if suite.options.tiny else CALLS
    for variant, forward in variants(*made).items():
        if suite.out_of_time():
            return
        if variant in (CALL, EXACT) and not on_gpu:
            continue  # they compute there

        def whole(forward: Callable[[], Tensor] = forward) -> Any:
            return torch.autograd.grad(forward(), made, upstream)

        with torch.set_grad_enabled(grad):
            us = microseconds(whole if grad else forward, suite.device, calls)
        suite.add(harness.Row(case, variant, us / 1e3, more={"us": us}))
    for variant, against in ((OP, SDPA), (EXACT, SDPA), (CALL, SDPA), (COMPILED, COMPILED_SDPA)) if on_gpu else ():
        suite.bar(case, variant, against, AT_MOST)


def run(argv: list[str] | None) -> int:
    options = harness.parser(__doc__.split("\n")[0]).parse_args(argv)
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    suite = harness.Suite("host", options, {"sizes": "batch, heads, key heads, queries, keys, head_dim"}, (SDPA,))
    if suite.device.type != "cuda":
        suite.note("on a CPU the start of generated kernels is left out")
    with started_by_nobody(suite.device):
        for case in CASES:
            measure(suite, case)
    return suite.finish()


if __name__ == "__main__":
    harness.main(run)
