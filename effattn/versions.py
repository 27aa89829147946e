"""Differences between the supported versions of torch and transformers, and access to Dynamo's state.

One function per difference, with the versions it concerns. Other code does not depend on versions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

# what Dynamo writes for ``x.mT`` and the like from torch 2.14 on; before, it writes ``getattr``
ATTRIBUTES: dict[Any, str] = {
    torch.ops.aten.numpy_T: "T",
    torch.ops.aten.mT: "mT",
    torch.ops.aten.matrix_H: "H",
    torch.ops.aten.mH: "mH",
}


def graph_being_made() -> Any | None:
    """Dynamo's ``OutputGraph`` of the compilation in this thread; None if there is none.

    Private API, the same in torch 2.11 to 2.14.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator  # takes a second to import

    try:
        return InstructionTranslator.current_tx().output
    except AttributeError:  # nothing is being compiled, or another version of Dynamo
        return None


def compiled_alone() -> dict[str, Any]:
    """Arguments of ``torch.compile`` so that earlier compilations do not count towards its recompile limit.

    {} before torch 2.13.
    """
    has = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if has else {}


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the cache argument of a transformers model: ``past_key_values`` in 5.17, ``cache`` in 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
