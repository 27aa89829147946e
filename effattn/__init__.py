"""effattn: a ``torch.compile`` backend that finds every attention in a model and uses the cheapest form allowed.

    fast = torch.compile(model, backend="effattn")        # lossless; does not need this import
    report = effattn.explain(model, *inputs)              # what happened to every attention, and why
    out = effattn.attention(q, k, v, form="power")        # any form as a function

Importing this module is cheap: each name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effattn.compiler.explain import explain
    from effattn.errors import (
        EffattnError,
        EvaluationError,
        FormRefused,
        OptionError,
        PlanError,
        PolicyError,
        RewriteError,
        VerificationError,
    )
    from effattn.functional import attention, forms
    from effattn.policy import Policy

_HOMES = {
    "attention": "effattn.functional",
    "forms": "effattn.functional",
    "explain": "effattn.compiler.explain",
    "Policy": "effattn.policy",
    "EffattnError": "effattn.errors",
    "EvaluationError": "effattn.errors",
    "FormRefused": "effattn.errors",
    "OptionError": "effattn.errors",
    "PlanError": "effattn.errors",
    "PolicyError": "effattn.errors",
    "RewriteError": "effattn.errors",
    "VerificationError": "effattn.errors",
}

__all__ = [
    "EffattnError",
    "EvaluationError",
    "FormRefused",
    "OptionError",
    "PlanError",
    "Policy",
    "PolicyError",
    "RewriteError",
    "VerificationError",
    "attention",
    "explain",
    "forms",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("effattn")
        except PackageNotFoundError:  # run from a checkout
            return "unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'effattn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})
