"""Differences between the supported versions of torch and transformers, and access to private names of torch.

One function per difference, with the versions it concerns, or per private name, the same in torch 2.11 to 2.14. Other
code does not depend on versions. Functions import Dynamo's modules themselves, since that takes a second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
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
    """Dynamo's ``OutputGraph`` of the compilation in this thread; None if there is none."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

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


def quick_empty(kind: str) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] | None:
    """``torch.empty_strided`` on the current device of a type, past the dispatcher, as Inductor's code calls it.

    None if there is none.
    """
    from torch._C._dynamo import guards

    return getattr(guards, f"_empty_strided_{kind}", None)


def sdpa_settings() -> tuple[Any, ...]:
    """What the user has set that ``torch._fused_sdp_choice`` depends on: backends, their order, determinism."""
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
        torch._C._get_overrideable_sdp_enabled(),
        torch._C._get_cudnn_enabled(),
        torch._C._get_deterministic_algorithms(),
        torch._C._get_deterministic_algorithms_warn_only(),
        *torch._C._get_sdp_priority_order(),
    )


# -- what Dynamo keeps of its compilations ----------------------------------------------------------------------------


def keep_records(count: int) -> None:
    """Let Dynamo keep the records of at least ``count`` compilations; 64 by default."""
    from torch._dynamo import utils

    if (utils._compilation_metrics.maxlen or count) < count:
        utils.set_compilation_metrics_limit(count)


def records() -> Sequence[Any]:
    """Dynamo's records of its compilations, oldest first: ``CompilationMetrics``."""
    from torch._dynamo import utils

    return utils.get_compilation_metrics()


def is_written_by_dynamo(code: CodeType) -> bool:
    return code in torch._dynamo.convert_frame.output_codes


def is_skipped(code: CodeType) -> bool:
    """Whether Dynamo's rules skip the file of ``code``."""
    return torch._dynamo.trace_rules.check(code)


def disabled_in(frame: FrameType) -> tuple[str, str | None] | None:
    """The name of the function that ``torch.compiler.disable`` runs in ``frame``, and the reason given to it.

    None if ``frame`` is not that of its wrapper.
    """
    if frame.f_code.co_name != "_fn" or not frame.f_code.co_filename.endswith("/_dynamo/eval_frame.py"):
        return None
    function, context = frame.f_locals.get("fn"), frame.f_locals.get("self")
    return getattr(function, "__qualname__", type(function).__name__), getattr(context, "msg", None)


# -- what Dynamo and FlexAttention do ---------------------------------------------------------------------------------


def let_through() -> type[Exception]:
    """The class of exceptions that Dynamo passes on from a backend; it wraps all others in ``BackendCompilerFailed``.

    Users see the traceback from its ``first_useful_frame`` on.
    """
    from torch._dynamo.exc import ShortenTraceback

    return ShortenTraceback


def flex_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The scores [B, H, Nq, Nk] in the eager implementation of ``torch.ops.higher_order.flex_attention``."""
    from torch._higher_order_ops.flex_attention import _math_attention_inner

    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).expand(query.shape[0], -1, -1, -1)
    return _math_attention_inner(query, key, value, *rest)[1]
