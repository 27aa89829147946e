"""Every row through every column: what comes out, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile

from effattn.compiler.report import collect
from tests.conformance.row import Row
from tests.helpers.comparing import assert_close

COLUMNS = ("Inductor", "FlexAttention", "effattn", "effattn, FlexAttention's call")
RIGHT, UNFUSED = "right", "right, as written"


@dataclass(frozen=True)
class Outcome:
    """``verdict``: "right", "right, as written" (not replaced), "wrong", "error", "compiled n times", "memory for every
    pair", "needs ...", or "-" (does not apply)."""

    verdict: str
    detail: str = ""


def run(row: Row, column: str, device: torch.device, rest: str = "inductor") -> Outcome:
    """What comes of a row in a column. ``rest``: what compiles what is not attention, in effattn's columns."""
    by_flex = "FlexAttention" in column
    if by_flex and row.flex is None:
        return Outcome("-")
    if needs := _needs(row, by_flex, device):
        return Outcome(f"needs {needs}")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        with collect.listening() as heard:
            biggest = _compare(row, _compiled(row, column, rest), device)
    except AssertionError as error:
        return Outcome("wrong", _line(error))
    except Exception as error:
        return Outcome("error", f"{type(error).__name__}: {_line(error)}")
    return _judge(row, column, heard, biggest, row.calls(device)[0][0].shape)


def _needs(row: Row, by_flex: bool, device: torch.device) -> str:
    if row.needs == "several GPUs":
        return row.needs
    if device.type == "cuda":
        return ""
    return row.needs or ("a GPU" if by_flex and row.grad else "")  # FlexAttention has gradients on GPUs alone


def _compiled(row: Row, column: str, rest: str) -> Callable[..., Any]:
    if column == "FlexAttention":  # as its documentation has it: the call alone is compiled
        fast = torch.compile(flex_attention, mode=row.mode)
        return lambda *given: row.flex(fast, *given)  # type: ignore[misc]
    if column == "Inductor":
        return torch.compile(row.function, fullgraph=True, mode=row.mode)
    function = row.function
    if "FlexAttention" in column:
        function = lambda *given: row.flex(flex_attention, *given)  # type: ignore[misc]  # noqa: E731
    options = {"rest": rest, "strict": True, "mode": row.mode}
    return torch.compile(function, backend="effattn", fullgraph=True, options=options)


def _compare(row: Row, fast: Callable[..., Any], device: torch.device) -> int:
    """Fails where a call differs from the function in float64; the largest thing that was allocated, in bytes."""
    biggest = 0
    for given in row.calls(device):
        wanted = _results(row.function, [_wide(x) for x in given], row.grad)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            got = _results(fast, [x.clone() if isinstance(x, Tensor) else x for x in given], row.grad)
        assert_close(got, wanted, exact_dtype=False)
        events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
        biggest = max([biggest, *(event.nbytes() for event in events if event.name() == "[memory]")])
    return biggest


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _results(function: Callable[..., Any], given: list[Any], grad: bool) -> list[Tensor]:
    """The result, and the gradients of a sum in which every element counts differently."""
    floats = [x.requires_grad_() for x in given if isinstance(x, Tensor) and x.is_floating_point()] if grad else []
    with torch.set_grad_enabled(grad):
        out = function(*given)
    if not grad:
        return [out.clone()]  # a CUDA graph writes the next result into the same memory
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), floats)]


def _judge(row: Row, column: str, heard: collect.Collected, biggest: int, shape: torch.Size) -> Outcome:
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    if graphs > row.graphs:
        return Outcome(f"compiled {graphs} times")
    if row.small and biggest >= shape[2] ** 2:
        return Outcome("memory for every pair", f"{biggest:,} bytes at once, of {shape[2]:,} tokens")
    if column == "FlexAttention" or row.calls_sdpa:
        return Outcome(RIGHT)
    if column == "Inductor":
        return Outcome(RIGHT if counters["inductor"]["fuse_attention"] else UNFUSED)
    missed = [one.reason for graph in heard.graphs for one in graph.missed]
    missed += [choice.reason for choice in heard.choices if choice.route == "keep"]
    sites = sum(len(graph.sites) for graph in heard.graphs)
    return Outcome(RIGHT) if sites and not missed else Outcome(UNFUSED, "; ".join(dict.fromkeys(missed)))


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:200]
