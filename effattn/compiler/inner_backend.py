"""The rest of the graph: compiled by Inductor, or run eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from effattn.compiler.options import Options
from effattn.passes.rewrite.as_written import keep_as_written


def compile_rest(gm: fx.GraphModule, example_inputs: list[Any], options: Options) -> Callable:
    """A callable that runs the rewritten graph."""
    if options.inner_backend == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    keep_as_written(gm)

    patches: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        from torch._inductor import list_mode_options

        patches |= list_mode_options(options.mode)
    if options.verify:
        patches["fallback_random"] = True  # the same random numbers as the original graph, which runs beside it
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)
    return compiled
