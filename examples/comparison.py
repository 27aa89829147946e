"""Time and memory of one call, eager, by Inductor and by effattn, as tables and a picture; used by demo.py."""

from __future__ import annotations

import contextlib
import copy
import html
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_block import LightningBlock
from rich.table import Table
from screen import Screen, table

BACKENDS = ("eager", "Inductor", "effattn")
PADDED = {"cpu": (2, 3072), "cuda": (8, 8192)}  # layers and tokens of the padded prompts
LINEAR = {"cpu": 4096, "cuda": 16384}  # tokens of the block of linear attention
COLOURS = {"eager": "#9aa5b1", "Inductor": "#5b7fa6", "effattn": "#2a7d4f"}


@dataclass(frozen=True)
class Measured:
    """One call by one backend."""

    case: str
    backend: str
    seconds: float
    mib: float  # most memory that the call held at once, beside what was there before
    difference: float  # largest, from eager's result


def padded(model: Any, text: Any, variants: list[str], inner: str, screen: Screen) -> Iterator[list[Measured]]:
    """Two prompts of which one is shorter and padded on the left, with both attentions of transformers."""
    device = text.device.type
    layers, length = PADDED[device]
    body = copy.copy(model.base_model)
    body._modules = {**body._modules, "layers": body.layers[:layers]}
    ids = text[0, : 2 * length].view(2, length)
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0

    def call(model: Any) -> Any:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, length // 3 :]

    for attention, called in (("eager", "attention as a softmax"), ("sdpa", "attention by SDPA")):
        model.set_attn_implementation(attention)
        case = f"{called}, {layers} of the model's layers, 2 x {length:,} tokens, one of them padded"
        with screen.step(f"{case}: {', '.join(variants)}"):
            rows = list(measure(case, call, compiled(body, variants, inner)))
        yield rows


def linear(device: str, variants: list[str], inner: str, screen: Screen) -> Iterator[list[Measured]]:
    """A block of linear attention, written with N x N numbers as its paper defines it."""
    torch.manual_seed(0)
    block, x = LightningBlock().to(device), torch.randn(1, LINEAR[device], 256, device=device)
    case = f"a block of linear attention (examples/lightning_block.py), {LINEAR[device]:,} tokens"
    with screen.step(f"{case}: {', '.join(variants)}"):
        rows = list(measure(case, lambda block: block(x), compiled(block, variants, inner)))
    yield rows


def compiled(model: Any, variants: list[str], inner: str) -> dict[str, Any]:
    """``model`` by each backend."""
    made = {
        "eager": model,
        "Inductor": torch.compile(model),
        "effattn": torch.compile(model, backend="effattn", options={"rest": inner}),
    }
    return {name: made[name] for name in variants}


def measure(case: str, call: Callable[[Any], torch.Tensor], variants: dict[str, Any]) -> Iterable[Measured]:
    """``call(model)`` with each of ``variants``, "eager" first: once to compile, once for time, once for memory."""
    expected = None
    for backend, model in variants.items():
        torch._dynamo.reset()
        with torch.no_grad():
            result = call(model)
            expected = result if expected is None else expected
            seconds = _seconds(lambda model=model: call(model))
            mib = _peak(lambda model=model: call(model))
        yield Measured(case, backend, seconds, mib, (result - expected).abs().max().item())


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    """The least of up to three calls, as many as fit two seconds: others may use the machine too."""
    taken: list[float] = []
    while len(taken) < 3 and sum(taken) < 2:
        start = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _peak(call: Callable[[], torch.Tensor]) -> float:
    """MiB that ``call`` adds to what is held, at its worst: from the allocator on a GPU, else from the profiler."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = record.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the profiler writes on standard error by itself."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def as_table(rows: Sequence[Measured]) -> Table:
    made = table("", "seconds", "MiB at most", "largest difference")
    for row in rows:
        difference = f"{row.difference:.1e}" if row is not rows[0] else ""
        made.add_row(row.backend, f"{row.seconds:.2f}", f"{row.mib:,.0f}", difference)
    return made


def verdict(rows: Sequence[Measured]) -> str:
    """What effattn costs beside the others of one case, in words; what is no gain says so."""
    ours = next(row for row in rows if row.backend == "effattn")
    parts = []
    for row in rows:
        if row is not ours:
            saved = [_said("memory", ours.mib, row.mib), _said("time", ours.seconds, row.seconds)]
            parts.append(f"against {row.backend}: {' and '.join(saved)}")
    return "; ".join(parts)


def _said(what: str, ours: float, theirs: float) -> str:
    ratio = ours / max(theirs, 1e-9)
    return f"{ratio:.2g} of its {what}" + (" (no gain here)" if ratio > 0.97 else "")


def picture(rows: Sequence[Measured], title: str) -> str:
    """Bars of time and memory by case as one SVG, each case to its own scale."""
    cases = list(dict.fromkeys(row.case for row in rows))
    lines, y = [_text(16, 28, title, "font-weight='600' font-size='16'")], 48
    for case in cases:
        members = [row for row in rows if row.case == case]
        lines.append(_text(16, y + 14, case, "font-weight='600'"))
        y += 24
        columns: tuple[tuple[int, Callable[[Measured], float], str], ...] = (
            (110, lambda row: row.seconds, "{:.2f} s"),
            (500, lambda row: row.mib, "{:,.0f} MiB"),
        )
        for row in members:
            lines.append(_text(16, y + 13, row.backend))
            for x, of, form in columns:
                width = max(2, 260 * of(row) / max(of(other) for other in members))
                lines.append(f"<rect x='{x}' y='{y}' width='{width:.0f}' height='17' fill='{COLOURS[row.backend]}'/>")
                lines.append(_text(x + int(width) + 6, y + 13, form.format(of(row))))
            y += 22
        y += 12
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='880' height='{y}' font-family='sans-serif' font-size='13'>"
    return "\n".join([head, f"<rect width='880' height='{y}' fill='white'/>", *lines, "</svg>"]) + "\n"


def _text(x: int, y: int, text: str, more: str = "") -> str:
    return f"<text x='{x}' y='{y}' {more}>{html.escape(text)}</text>"


def write_picture(rows: Sequence[Measured], title: str, path: pathlib.Path) -> pathlib.Path:
    path.write_text(picture(rows, title), encoding="utf-8")
    return path.resolve()
