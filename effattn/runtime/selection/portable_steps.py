"""Score and pick through ATen, under the names that both targets have."""

from effattn.runtime.selection.pick import choose_into, covering_counts
from effattn.runtime.selection.scores import Scorer

__all__ = ["Scorer", "choose_into", "covering_counts"]
