"""The Triton target: kernels generated for each specialisation."""

from effattn.runtime.targets.triton import linear
from effattn.runtime.targets.triton.backward import CALLS as BACKWARD_CALLS
from effattn.runtime.targets.triton.backward import run_backward
from effattn.runtime.targets.triton.forward import CALLS, run
from effattn.runtime.targets.triton.limits import unsupported


def forget() -> None:
    """Choose kernels anew for every call."""
    CALLS.clear()
    BACKWARD_CALLS.clear()


__all__ = ["forget", "linear", "run", "run_backward", "unsupported"]
