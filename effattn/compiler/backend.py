"""The backend: one compilation from start to end.

It is registered as entry point ``effattn`` of the group ``torch_dynamo_backends``, so
``torch.compile(model, backend="effattn")`` works without an import.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from effattn.compiler.assumptions import assuming
from effattn.compiler.inner_backend import compile_rest
from effattn.compiler.options import Options
from effattn.compiler.pipeline import run_passes
from effattn.compiler.raising import as_they_are
from effattn.compiler.report import collect, effect
from effattn.compiler.verify import verified
from effattn.errors import OptionError
from effattn.ir.refusal import Why
from effattn.lowering.device import device_type
from effattn.passes.compilation import Outcome
from effattn.runtime.targets.choice import ANYWHERE
from effattn.settings import warn_once

torch.compiler.allow_in_graph(torch._safe_softmax)  # Dynamo would break the graph at it


@as_they_are
def effattn(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable:
    """Compile a Dynamo graph: attention by effattn, the rest by Inductor.

    ``options``: see :class:`effattn.compiler.options.Options`. An exception at one attention leaves that attention
    alone. An exception of a whole pass leaves the graph unchanged, with a warning, or is raised with ``strict``.

    Raises:
        OptionError, PolicyError: an option or the policy is invalid, or Triton kernels are requested where they cannot
            run. Users of ``torch.compile`` get them with these types, at the first call of the compiled model.
        FormRefused: with ``strict``, a form of the policy does not apply at a site that its rule matches.
    """
    settings = Options.read(options, mode)
    start = time.perf_counter()
    try:
        outcome = run_passes(gm, settings, example_inputs)
        failure = None
    except OptionError:  # the user's request cannot be met
        raise
    except Exception as error:
        if settings.strict:
            raise
        outcome, failure = Outcome(), error
        warnings.warn(
            f"effattn left this graph as it was because of {type(error).__name__}: {error}. "
            'The model still runs, without effattn; options={"strict": True} raises this.',
            stacklevel=2,
        )
    outcome.seconds["passes"] = time.perf_counter() - start
    _tell_errors(outcome)
    _tell_portable(outcome)
    untouched = fx.GraphModule(gm, outcome.original) if outcome.assumed and outcome.original is not None else None
    start = time.perf_counter()
    compiled = compile_rest(gm, example_inputs, settings)
    outcome.seconds["rest"] = time.perf_counter() - start
    collect.emit(gm, outcome, settings, failure)
    if not collect.is_collecting():  # the report would repeat these warnings
        effect.warn_once(gm, outcome.choices, settings.policy)
    if settings.verify and outcome.original is not None:
        compiled = verified(compiled, gm, outcome, settings)
    if untouched is not None:
        compiled = assuming(compiled, outcome.assumed, example_inputs, partial(_with_data, untouched, options, mode))
    return compiled


def _with_data(untouched: fx.GraphModule, options: dict[str, Any] | None, mode: str | None) -> Callable:
    """Compile Dynamo's original graph with all inputs as data, none known as a model's buffer."""
    given = {name: value for name, value in (options or {}).items() if name != "policy"}
    return torch.compile(untouched, backend=partial(effattn, options=given, mode=mode))


def _tell_errors(outcome: Outcome) -> None:
    """Warn about attention that was left alone because of an error."""
    for missed in outcome.missed:
        if missed.refusal.rule == Why.UNEXPECTED:
            where = f" ({missed.location})" if missed.location else ""
            warnings.warn(
                f"effattn left {missed.name}{where} as it was because of {missed.refusal}. The model still runs.",
                stacklevel=3,
            )


def _tell_portable(outcome: Outcome) -> None:
    """Warn once that the portable target runs instead of Triton kernels: its timings are not theirs."""
    ops = [(choice.match.site.device, choice.plan) for choice in outcome.choices if choice.plan is not None]
    if any(plan.dispatch.target is None and device_type(device).target == ANYWHERE for device, plan in ops):
        warn_once("no GPU here: attention that needs a generated kernel runs on the portable target (ATen, blockwise)")
