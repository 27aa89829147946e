"""``effattn.explain``: compile a model, run it once, say what happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effattn import settings as environment
from effattn.compiler.backend import effattn as backend
from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.compiler.report.model import Report
from effattn.compiler.report.outside import Watch
from effattn.versions import compiled_alone


def explain(
    model: Any, *args: Any, policy: Any = None, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Compile ``model``, call it once with the given arguments, and report on every attention in it.

    Args:
        model: a module or function; it is not changed, and code that was compiled before stays valid.
        args, kwargs: handed to the model.
        policy: as in ``torch.compile(..., options={"policy": ...})``.
        options: other options of the backend. Everything that is not attention runs eagerly unless
            ``{"inner_backend": "inductor"}`` is given, because only the passes are of interest here.

    Returns:
        The report; ``print`` it, or read ``report.sites``, ``report.missed``, and ``report.outside``: attention that
        ran eagerly in this call because Dynamo made no graph of it.

    Raises:
        PolicyError, OptionError: the policy or an option is not valid, or a rule names layers beyond the model.
    """
    given = dict(options or {})
    if "rest" not in given:
        given.setdefault("inner_backend", "eager")
    if policy is not None:
        given["policy"] = policy
    settings = Options.read(given)
    environment.current()  # a mistake in a variable is told as itself, not as a failure of torch.compile

    watch = Watch()

    def explained(gm, example_inputs):
        compiled = backend(gm, example_inputs, options=given)
        return watch.graph(compiled, events.graphs[-1].ran)

    with collect.listening() as events, torch._dynamo.config.patch(_limits()), watch:
        torch.compile(_uncompiled(model), backend=explained, **compiled_alone())(*args, **kwargs)
    report = events.report(settings, watch.outside())
    settings.policy.check_sites(choice.match.site for choice in events.choices)
    return report


def _uncompiled(model: Any) -> Any:
    """``model`` without what ``model.compile()`` put before it; ``torch.compile`` takes off its own wrappers itself."""
    in_place = isinstance(model, torch.nn.Module) and model._compiled_call_impl is not None
    return model._call_impl if in_place else model


def _limits() -> dict[str, Any]:
    """Where earlier compilations count, a limit that lets this one through, less true of a model that runs into it."""
    return {} if compiled_alone() else {"recompile_limit": 64}
