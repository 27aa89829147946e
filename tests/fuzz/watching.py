"""What the rewritten graph really computes: the calls of ``effattn::attend``, and their predicates in numpy."""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from effattn.ir.fold import fold
from effattn.ir.plan import Plan
from effattn.runtime.ops.attend import target_of
from effattn.runtime.targets import portable
from tests.fuzz.case import Case
from tests.fuzz.where import COMPILED, DEVICE

MASKED = -5000.0  # a score of nothing but fills is below, a score of data above


@dataclass(frozen=True)
class Call:
    """One call of the op: what it was told to compute."""

    plan: Plan
    shape: tuple[int, int, int, int]  # [B, H, Nq, Nk]
    captures: dict[str, np.ndarray]
    scalars: dict[str, int]
    numbers: dict[str, float]
    kernels: bool  # whether generated kernels run it

    def allowed(self) -> np.ndarray:
        """bool [B, H, Nq, Nk]: what its predicate allows and its score does not push out of sight."""
        return seen(
            self.plan.spec.predicate, self.plan.spec.score, self.shape, self.captures, {**self.scalars, **self.numbers}
        )


class Calls(TorchDispatchMode):
    """Keeps every call of the op that is made inside."""

    supports_higher_order_operators = True

    def __init__(self, kept: list[Call]):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.effattn.attend.default:
            query, key, value, captures, scalars, numbers, text = args[:7]
            plan = Plan.decode(text)
            held = [load.detach().cpu() for load in captures]
            held = [load.double() if load.is_floating_point() else load for load in held]
            self.kept.append(
                Call(
                    plan,
                    (*query.shape[:3], key.shape[2]),
                    {spec.name: load.numpy().copy() for spec, load in zip(plan.spec.captures, held, strict=True)},
                    dict(zip(plan.spec.scalars, scalars, strict=True)),
                    dict(zip(plan.spec.numbers, numbers, strict=True)),
                    target_of(plan.at(key.shape[2]), query, value) is not portable,
                )
            )
        return function(*args, **(kwargs or {}))


@contextmanager
def one_interpreter_at_a_time() -> Iterator[None]:
    """Triton's interpreter replaces functions of ``triton.language`` while a kernel runs: its launches take turns."""
    if COMPILED or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    lock, launch = threading.Lock(), GridExecutor.__call__

    def in_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return launch(self, *args, **kwargs)

    GridExecutor.__call__ = in_turn
    try:
        yield
    finally:
        GridExecutor.__call__ = launch


@contextmanager
def small_tiles(on: bool) -> Iterator[None]:
    """On a GPU: the interpreter's tiles, of which small lengths have several."""
    if not on or DEVICE == "cpu":
        yield
        return
    from effattn.lowering.schedules import attention as configs
    from effattn.runtime.targets import triton as triton_target
    from effattn.runtime.targets.triton.specialise import specialise

    choose = configs.choose

    def of_the_interpreter(kind: Any, plan: Any, arch: str, *sizes: Any) -> Any:
        return choose(kind, plan, "interpreter", *sizes)

    def forget() -> None:
        specialise.cache_clear()
        triton_target.forget()

    configs.choose = of_the_interpreter
    forget()
    try:
        yield
    finally:
        configs.choose = choose
        forget()


@contextmanager
def judged_by_math(case: Case) -> Iterator[None]:
    """On a GPU: SDPA's own definition, where a mask of the lowest number may hide every key of a row.

    A score and the lowest number are the lowest number, and the row is the mean of all values. PyTorch's fused
    kernels give other numbers there, each its own.
    """
    lowest = case.sdpa_mask == "lowest" or case.hostile == "given lowest in SDPA"
    with sdpa_kernel(SDPBackend.MATH) if lowest and DEVICE == "cuda" else nullcontext():
        yield


def seen(predicate: Any, score: Any, shape: tuple[int, ...], captures: dict, symbols: dict) -> np.ndarray:
    """A predicate and a score with ``s = 0`` on the whole grid."""
    grid = dict(zip("bhqk", np.indices(shape), strict=True))
    algebra = _Numpy({**grid, **symbols, "Nq": shape[2], "Nk": shape[3], "s": 0.0}, captures)
    with np.errstate(all="ignore"):
        return np.broadcast_to(np.logical_and(fold(predicate, algebra), fold(score, algebra) > MASKED), shape)


class _Numpy:
    """The algebra of expressions over numpy's arrays: written apart from the backend's own, which is what is tested."""

    TABLE = {  # noqa: RUF012
        "add": np.add, "mul": np.multiply, "div": np.true_divide, "min": np.minimum, "max": np.maximum, "abs": np.abs,
        "group": lambda x: x, "floordiv": np.floor_divide, "mod": np.remainder, "le": np.less_equal, "lt": np.less,
        "ge": np.greater_equal, "gt": np.greater, "eq": np.equal, "ne": np.not_equal, "not": np.logical_not,
        "and": np.logical_and, "or": np.logical_or, "where": np.where, "tanh": np.tanh, "exp": np.exp, "log": np.log,
        "sqrt": np.sqrt, "sign": np.sign,
    }  # fmt: skip

    def __init__(self, symbols: dict[str, Any], captures: dict[str, np.ndarray]):
        self.symbols, self.captures = symbols, captures

    def constant(self, value: Any) -> Any:
        return value if not isinstance(value, float) or math.isfinite(value) else np.float64(value)

    def symbol(self, name: str) -> Any:
        return self.symbols[name]

    def load(self, name: str, indices: list[Any]) -> Any:
        """An element out of range may be read where nothing uses it: any value will do."""
        held = self.captures[name]
        inside = [np.clip(index, 0, size - 1) for index, size in zip(indices, held.shape, strict=True)]
        value = held[tuple(inside)]
        return value.astype(np.int64) if value.dtype != np.float64 else value

    def call(self, operation: str, *args: Any) -> Any:
        return self.TABLE[operation](*args)
