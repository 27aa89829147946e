"""``effattn.explain``: compile a model, run it once, and report."""

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
        model: a module or function; it is not changed, and earlier compilations of it stay valid.
        args, kwargs: passed to the model.
        policy: as in ``torch.compile(..., options={"policy": ...})``.
        options: other options of the backend. The rest of the graph runs eagerly unless
            ``{"inner_backend": "inductor"}`` is given, since only the passes matter here.

    Returns:
        The report; ``print`` it, or read ``report.sites``, ``report.missed`` and ``report.outside``. The last lists
        attention that ran eagerly in this call because it is in no graph.

    Raises:
        PolicyError, OptionError: the policy or an option is invalid, or a rule names layers that do not exist.
    """
    given = dict(options or {})
    if "rest" not in given:
        given.setdefault("inner_backend", "eager")
    if policy is not None:
        given["policy"] = policy
    settings = Options.read(given)
    environment.current()  # so that an invalid variable is not reported as a failure of torch.compile

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
    """``model`` without the wrapper of ``model.compile()``; ``torch.compile`` removes its own wrappers itself."""
    in_place = isinstance(model, torch.nn.Module) and model._compiled_call_impl is not None
    return model._call_impl if in_place else model


def _limits() -> dict[str, Any]:
    """A recompile limit that earlier compilations, where they count, do not exhaust."""
    return {} if compiled_alone() else {"recompile_limit": 64}
