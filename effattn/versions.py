"""What differs between the versions of torch and transformers that are supported, and where Dynamo keeps its state.

A function here for each difference, with the versions that need it; all other code is the same for every version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


def graph_being_made() -> Any | None:
    """Dynamo's ``OutputGraph`` of what this thread compiles; None while it compiles nothing.

    Private, and the same in torch 2.11 to 2.14.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator  # takes a second to import

    try:
        return InstructionTranslator.current_tx().output
    except AttributeError:  # nothing is being compiled, or Dynamo keeps it elsewhere
        return None


def compiled_alone() -> dict[str, Any]:
    """Arguments of ``torch.compile`` that keep earlier compilations from counting against its limit.

    From torch 2.13 on; {} before.
    """
    has = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if has else {}


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a model of transformers calls its key/value cache: ``past_key_values`` in 5.17, ``cache`` in 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
