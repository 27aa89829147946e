"""One case tried: run by itself, compiled, run twice, and held against itself in float64."""

from __future__ import annotations

import threading
import time
import traceback
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from effattn.compiler.backend import effattn
from effattn.compiler.report import collect
from effattn.ir import expr
from tests.fuzz.case import Case
from tests.fuzz.expected import problem
from tests.fuzz.watching import Call, Calls, judged_by_math, one_interpreter_at_a_time, seen, small_tiles
from tests.fuzz.where import DEVICE
from tests.helpers.small_strips import small_strips

# rounding that is forgiven beside twice the user's own, of values about 1
EPSILON = {torch.float32: 4e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class Trial:
    """What came of a case. ``problem`` is empty where everything is right."""

    case: Case
    problem: str = ""
    sites: int = 0
    predicates: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    compared: int = 0  # masks that were compared with the case's own
    kernels: int = 0  # calls that generated kernels ran
    graphs: int = 0
    eager: str = ""  # what the function itself raises: then there is nothing to hold it against
    detail: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if self.problem or self.eager:
            return "wrong" if self.problem else "no case"
        return "found" if self.sites else "refused" if self.reasons else "nothing"


class Wrong(Exception):
    """Something is not as it has to be."""


class NoCase(Exception):
    """The function itself raises."""


def run(case: Case) -> Trial:
    """Try a case; whatever fails is in the trial."""
    trial, start = Trial(case), time.perf_counter()
    try:
        strips = small_strips() if case.seed % 2 == 0 and DEVICE == "cpu" else nullcontext()
        with small_tiles(case.seed % 2 == 0), strips, judged_by_math(case):
            _run(case, trial)
    except NoCase as raised:
        trial.eager = str(raised)
        trial.reasons = [f"eager: {trial.eager}"]
    except Wrong as wrong:
        trial.problem = str(wrong)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        trial.problem = f"{type(error).__name__}: {lines[0][:300]}"
        trial.detail = traceback.format_exc()
    trial.seconds = time.perf_counter() - start
    return trial


class Watched:
    """The backend with its reports, site records and op calls kept, graph by graph."""

    def __init__(self, target: str) -> None:
        self.options = {"rest": "eager", "strict": True, "verify": True, "target": target}
        self.heard: list[collect.Collected] = []
        self.calls: dict[int, list[Call]] = defaultdict(list)  # by thread

    def __call__(self, gm: Any, inputs: Any) -> Any:
        with collect.listening() as heard:
            function = effattn(gm, inputs, options=self.options)
        self.heard.append(heard)

        def run(*args: Any) -> Any:
            with Calls(self.calls[threading.get_ident()]):
                return function(*args)

        return run


def _run(case: Case, trial: Trial) -> None:
    torch._dynamo.reset()
    watched, function = Watched(case.target), case.function()
    compiled = torch.compile(function, backend=watched, dynamic=False if case.shapes == "static" else None)
    for call, sizes in enumerate(case.calls):
        graphs, which = len(watched.heard), f"call {call + 1}"
        given = [case.tensors(call, thread) for thread in range(case.threads)]
        try:
            eager = [Outcome.of(case, function, own) for own in given]
        except Exception as error:
            raise NoCase(f"{type(error).__name__}: {str(error).strip()[:200]}") from error
        done = _at_once(case, compiled, watched, given, mark=case.shapes == "marked")
        trial.graphs = len(watched.heard)
        if not call or trial.graphs > graphs:
            _look_at(case, trial, watched.heard[graphs:])
        for own, theirs, (actual, calls) in zip(given, eager, done, strict=True):
            trial.kernels += sum(call.kernels for call in calls)
            allowed = case.allowed(own, sizes)
            if allowed is not None:
                _compare_masks(trial, calls, watched.heard if not call else [], allowed, which)
            expected = Outcome.of(case, function, own, torch.float64)
            rounded = case.rounded()
            shaken = expected if rounded is None else Outcome.of(case, rounded, own, torch.float64)
            _compare(actual, theirs, expected, shaken, which)


def _at_once(
    case: Case, compiled: Any, watched: Watched, given: list[dict[str, Tensor]], mark: bool
) -> list[tuple[Outcome, list[Call]]]:
    """A call in every thread, all at once: what came of it, and what the op was told."""
    start = threading.Barrier(case.threads)

    def run(own: dict[str, Tensor]) -> tuple[Outcome, list[Call]]:
        calls = watched.calls[threading.get_ident()]
        calls.clear()
        start.wait()
        outcome = Outcome.of(case, compiled, own, mark=mark)
        return outcome, list(calls)

    if case.threads == 1:
        return [run(given[0])]
    with ThreadPoolExecutor(case.threads) as pool, one_interpreter_at_a_time():
        return list(pool.map(run, given))


def _look_at(case: Case, trial: Trial, heard: list[collect.Collected]) -> None:
    """Found, or refused for a reason that is right; nothing left out."""
    sites = [site for one in heard for graph in one.graphs for site in graph.sites]
    missed = [missed for one in heard for graph in one.graphs for missed in graph.missed]
    trial.sites = len(sites)
    trial.predicates = [site.predicate for site in sites]
    trial.reasons = [one.reason for one in missed]
    if wrong := problem(case, len(sites), missed, len(heard)):
        raise Wrong(wrong)


# -- masks ----------------------------------------------------------------------------------------------------------


def _compare_masks(
    trial: Trial, calls: list[Call], heard: list[collect.Collected], allowed: np.ndarray, which: str
) -> None:
    """What the op was told, and what the report shows, against the case's own mask."""
    for call in calls:
        _same_mask(call.allowed(), allowed, f"{which}: the op was given the predicate {call.plan.spec.predicate}")
        trial.compared += 1
    for choice in heard[-1].choices if heard else []:
        site = choice.match.site
        free = expr.free_symbols(site.spec.predicate, site.spec.score) - {*expr.INDICES, expr.s, expr.Nq, expr.Nk}
        if site.spec.captures or free:
            continue
        hints = [int(getattr(site.hints, name)) for name in ("batch", "heads", "q_len", "k_len")]
        found = seen(site.spec.predicate, sympy.sympify(site.spec.score), tuple(hints), {}, {})
        _same_mask(found, allowed, f"{which}: the report shows the predicate {site.spec.predicate}")
        trial.compared += 1


def _same_mask(found: np.ndarray, allowed: np.ndarray, what: str) -> None:
    """The site may see batch and heads in one dimension, or in the other order."""
    if found.size != allowed.size:
        raise Wrong(f"{what} over {found.shape}, and the mask is {allowed.shape}")
    arrangements = (allowed, allowed.swapaxes(0, 1))
    if not any(np.array_equal(found, one.reshape(found.shape)) for one in arrangements):
        wrong = int((found != allowed.reshape(found.shape)).sum())
        raise Wrong(f"{what}, which differs from the mask at {wrong} of {allowed.size} places")


# -- values ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Results and gradients of one run."""

    results: list[Tensor]
    gradients: dict[str, Tensor]

    @staticmethod
    def of(case: Case, function: Any, given: dict[str, Tensor], dtype: torch.dtype | None = None, mark: bool = False):
        given = {
            name: (x.to(dtype) if dtype is not None and x.is_floating_point() else x).clone()
            for name, x in given.items()
        }
        wanted = case.differentiable(given) if case.grad else []
        for name in wanted:
            given[name].requires_grad_()
        for name, dims in case.dynamic().items() if mark else ():
            for dim in dims if name in given else ():
                torch._dynamo.maybe_mark_dynamic(given[name], dim)
        # SDPA's fused kernels take the weights of a row of nothing but the lowest number for ones in the gradient
        lowest = case.core == "sdpa" and case.sdpa_mask == "lowest" and case.grad
        kernels = sdpa_kernel(SDPBackend.MATH) if lowest else nullcontext()
        with torch.set_grad_enabled(case.grad), kernels:
            results = [leaf for leaf in tree_leaves(function(case.arguments(given))) if isinstance(leaf, Tensor)]
            results = [leaf for leaf in results if leaf.is_floating_point()]
        gradients: dict[str, Tensor] = {}
        if wanted and any(leaf.requires_grad for leaf in results):
            loss = sum((leaf.double() * _ramp(leaf)).sum() for leaf in results if leaf.requires_grad)
            assert isinstance(loss, Tensor)
            loss.backward()
            gradients = {name: given[name].grad.cpu() for name in wanted if given[name].grad is not None}
        return Outcome([leaf.detach().cpu() for leaf in results], gradients)


def _ramp(x: Tensor) -> Tensor:
    """Weights of a loss that no symmetry of the result leaves alone."""
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64, device=x.device)).view(x.shape)


def _compare(actual: Outcome, eager: Outcome, expected: Outcome, shaken: Outcome, which: str) -> None:
    """``expected``: in float64; ``shaken``: the same where scores are off by their rounding."""
    if len(actual.results) != len(eager.results):
        raise Wrong(f"{which}: {len(actual.results)} results instead of {len(eager.results)}")
    tensors = (outcome.results for outcome in (actual, eager, expected, shaken))
    for number, found in enumerate(zip(*tensors, strict=True)):
        _close(*found, f"{which}: result {number}")
        if _strides(actual.results[number]) != _strides(eager.results[number]):
            raise Wrong(f"{which}: result {number} has other strides than in eager")
    if actual.gradients.keys() != eager.gradients.keys():
        raise Wrong(f"{which}: gradients of {sorted(actual.gradients)} instead of {sorted(eager.gradients)}")
    for name in eager.gradients:
        ours, own, *rest = (outcome.gradients[name] for outcome in (actual, eager, expected, shaken))
        # where -inf hides all keys of a query, ours is NaN for the values; whether it is for query and key as well
        # depends on whether user code adds -inf, which is not seen
        ours = torch.where(own.isnan(), own, ours)
        _close(ours, own, *rest, f"{which}: gradient of {name}", slack=8)


def _strides(x: Tensor) -> list[int]:
    """Of the dimensions that have any: views and kernels behind attention may depend on them."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _close(actual: Tensor, eager: Tensor, expected: Tensor, shaken: Tensor, what: str, slack: float = 1) -> None:
    """Ours is at most twice as far from float64 as the user's own, or as the rounding of scores may bring anyone.

    Where the user's is far off by nature, ours is near his own: a row whose keys are all masked by a finite number
    holds what rounding makes of it, and there float64 is no judge.
    """
    if actual.shape != eager.shape or actual.dtype != eager.dtype:
        raise Wrong(f"{what} is {actual.dtype} {list(actual.shape)}, eager {eager.dtype} {list(eager.shape)}")
    if actual.numel() == 0:
        return
    ours, own, judge = actual.double(), eager.double(), expected.double()
    if not torch.equal(ours.isnan(), own.isnan()):
        raise Wrong(f"{what}: {int(ours.isnan().sum())} NaN, and {int(own.isnan().sum())} in eager")
    finite = ~(ours.isnan() | (ours == own))
    scale = max(1.0, own[own.isfinite()].abs().max().item()) if own.isfinite().any() else 1.0
    epsilon = EPSILON[actual.dtype] * scale * slack
    own_error, shaken_error = ((x - judge).abs().nan_to_num(nan=0.0, posinf=0.0) for x in (own, shaken.double()))
    ordinary = own_error[own_error <= 16 * epsilon]
    errors = [shaken_error.max().item(), ordinary.max().item() if ordinary.numel() else 0.0]
    limit = 2 * max(errors) + epsilon
    apart = torch.minimum((ours - judge).abs().nan_to_num(nan=float("inf")), (ours - own).abs())
    apart = torch.where(finite, apart, 0.0)
    if not apart.max() <= limit:
        raise Wrong(f"{what} is off by {apart.max().item():.3g} (limit {limit:.3g}, of values up to {scale:.3g})")
