"""Score and pick through ATen, under the names that both targets have."""

from effattn.runtime.select.pick import covering_counts, rank_into
from effattn.runtime.select.scores import Scorer

__all__ = ["Scorer", "covering_counts", "rank_into"]
