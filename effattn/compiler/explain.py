"""``effattn.explain``: compile a model, run it once, say what happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effattn import settings as environment
from effattn.compiler import collect
from effattn.compiler.backend import effattn as backend
from effattn.compiler.options import Options
from effattn.compiler.report import Report


def explain(
    model: Any, *args: Any, policy: Any = None, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Compile ``model``, call it once with the given arguments, and report on every attention in it.

    Args:
        model: a module or function; it is not changed, and code that was compiled before stays valid.
        args, kwargs: handed to the model.
        policy: as in ``torch.compile(..., options={"policy": ...})``.
        options: other options of the backend. Everything that is not attention runs eagerly unless
            ``{"rest": "inductor"}`` is given, because only the passes are of interest here.

    Returns:
        The report; ``print`` it, or read ``report.sites`` and ``report.missed``.

    Raises:
        PolicyError, OptionError: the policy or an option is not valid, or a rule names layers beyond the model.
    """
    given = {"rest": "eager", **(options or {})}
    if policy is not None:
        given["policy"] = policy
    settings = Options.read(given)
    environment.current()  # a mistake in a variable is told as itself, not as a failure of torch.compile

    def explained(gm, example_inputs):
        return backend(gm, example_inputs, options=given)

    with collect.listening() as heard, torch._dynamo.config.patch(recompile_limit=64):
        torch.compile(model, backend=explained)(*args, **kwargs)
    report = heard.report(settings)
    layers = [site.layer for site in report.sites if site.layer is not None]
    if layers:
        settings.policy.check_layers(max(layers) + 1)
    return report
