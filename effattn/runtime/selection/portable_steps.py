"""Score and pick through ATen, under the names that both targets have."""

from effattn.runtime.selection.pick import choose_into, top_p_counts
from effattn.runtime.selection.scores import Scorer

__all__ = ["Scorer", "choose_into", "top_p_counts"]
