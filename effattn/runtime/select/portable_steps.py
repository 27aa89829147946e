"""Score and pick through ATen, under the names that both targets have."""

from effattn.runtime.select.pick import choose_into, covering_counts
from effattn.runtime.select.scores import Scorer

__all__ = ["Scorer", "choose_into", "covering_counts"]
