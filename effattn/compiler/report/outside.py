"""Attention in no graph: it ran eagerly, in code after a graph break or that Dynamo skipped.

A dispatch mode observes every operator of one run. It ignores compilation, so it affects neither Dynamo nor its caches.
A counter around compiled graphs excludes the operators that these run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from effattn.compiler.report.breaks import Frame, Reasons
from effattn.passes.graph.provenance import TORCH

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "dot", "mv"}
SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Outside:
    """Attention that ran eagerly ``calls`` times at one place."""

    called: str  # softmax, scaled_dot_product_attention, flex_attention, ...
    location: str  # file:line of the user code
    calls: int
    reason: str  # why it is in no graph
    hint: str = ""


@dataclass
class _Call:
    called: str
    frames: tuple[Frame, ...]  # innermost first
    attention: bool  # a softmax counts only if a product uses its result


class Watch(TorchDispatchMode):
    """Records attention that runs eagerly. Wrap the backend's result with :meth:`graph`."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._calls: list[_Call] = []
        self._weights: WeakIdKeyDictionary = WeakIdKeyDictionary()  # results of softmaxes, and their views
        self._reasons = Reasons()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def graph(self, compiled: Callable[..., Any], ran: Callable[[], None]) -> Callable[..., Any]:
        """``compiled``, with its operators ignored; ``ran`` is called at every call."""

        def run(*args: Any) -> Any:
            ran()
            self._depth += 1
            try:
                return compiled(*args)
            finally:
                self._depth -= 1

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._depth and torch._C._current_graph_task_id() == -1:  # skip recomputation in a backward
            self._look(func, args, result)
        return result

    def _look(self, func: Any, args: tuple, result: Any) -> None:
        called = attention_of(func)
        if called is not None:
            call = _Call(called, _frames(sys._getframe(2)), attention=called != "softmax")
            self._calls.append(call)
            if called == "softmax":
                self._weights[result] = call
            return
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if not self._weights or not tensors:
            return
        if func.__name__.partition(".")[0] in PRODUCTS:
            for tensor in tensors:
                if (call := self._weights.get(tensor)) is not None:
                    call.attention = True
        elif (call := self._weights.get(tensors[0])) is not None:  # a view, cast or dropout, not a router's selection
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(first, torch.Tensor) and first.numel() == tensors[0].numel():
                self._weights[first] = call

    def outside(self) -> list[Outside]:
        """Attention that ran in no graph, with Dynamo's reasons, in the order of the first calls."""
        self._reasons.read()
        counts: Counter[tuple[str, str, str, str]] = Counter()
        for call in self._calls:
            if call.attention:
                user = next((frame for frame in call.frames if frame.user), call.frames[0])
                counts[call.called, f"{user.file}:{user.line}", *self._reasons.of(call.frames)] += 1
        return [
            Outside(called, location, calls, reason, hint) for (called, location, reason, hint), calls in counts.items()
        ]


def attention_of(func: Any) -> str | None:
    """The user's name of an operator if it is an attention or a softmax, else None."""
    name = func.__name__.partition(".")[0].strip("_")
    if getattr(func, "namespace", "") == "effattn" or "backward" in name:
        return None
    if name.startswith("scaled_dot_product") or name == "safe_softmax":  # only SDPA calls _safe_softmax
        return SDPA
    if name == "softmax":
        return name
    return name if "attention" in name or "flash_attn" in name or name == "transformer_encoder_layer_fwd" else None


def _frames(frame: FrameType | None) -> tuple[Frame, ...]:
    """The Python frames from the operator outwards, without those of the mode."""
    found: list[Frame] = []
    while frame is not None:
        code: CodeType = frame.f_code
        user = not code.co_filename.startswith((TORCH, "<eval_with_key>"))  # <eval_with_key>: generated by torch.fx
        if user or found:  # torch frames inside the innermost user frame belong to the mode and the called function
            found.append(Frame.of(frame, user))
        frame = frame.f_back
    return tuple(found) or (Frame("", 0, (lambda: None).__code__, False),)
