"""The portable target: any plan on any device, through ATen, chunk by chunk.

Memory grows with Nq + Nk, never with their product.
"""

from effattn.runtime.targets.portable import linear
from effattn.runtime.targets.portable.backward import run_backward
from effattn.runtime.targets.portable.forward import run

__all__ = ["linear", "run", "run_backward"]
