"""Score and pick in ATen, with the same names as ``triton_steps``."""

from effattn.runtime.selection.pick import choose_into, top_p_counts
from effattn.runtime.selection.scores import Scorer

__all__ = ["Scorer", "choose_into", "top_p_counts"]
