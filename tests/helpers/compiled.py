"""Compile a function with the backend, run it, and hold the result against the function itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comparing import assert_close

from effattn.compiler.backend import effattn
from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.compiler.report.model import Report


def compiled(
    function: Callable,
    *args: Any,
    dynamic: bool | None = None,
    lengths: tuple[int, ...] = (),
    tolerance: float | None = None,
    **options: Any,
):
    """(report, output) of ``function`` compiled strictly; fails if the output is not that of ``function``.

    ``lengths`` are the dimensions of tensor arguments that stay symbolic.
    """
    expected = function(*[_copy(arg) for arg in args])
    given = {"rest": "eager", "strict": True, "verify": True, **options}

    def backend(gm, example_inputs):
        return effattn(gm, example_inputs, options=given)

    torch._dynamo.reset()
    with collect.listening() as heard:
        fast = torch.compile(function, backend=backend, dynamic=dynamic)
        given_args = [_copy(arg) for arg in args]
        for arg in given_args:
            for dim in lengths if isinstance(arg, torch.Tensor) else ():
                torch._dynamo.maybe_mark_dynamic(arg, dim)
        actual = fast(*given_args)
    report: Report = heard.report(Options.read(given))
    if "policy" not in given:
        assert_close(actual, expected, tolerance)
    return report, actual


def _copy(arg: Any) -> Any:
    return arg.clone() if isinstance(arg, torch.Tensor) else arg
