"""Plans that kernels are tried on: every kind of mask, score and data, with tensors to go with them."""

from plans import empty_rows, kept, masks, scores  # each fills CASES
from plans.calls import CASES, CAUSAL, Call, Sizes, power_keep, tensors

BY_HEAD = ("window_per_head",)  # heads of a tile see different keys: never decoded

__all__ = [
    "BY_HEAD",
    "CASES",
    "CAUSAL",
    "Call",
    "Sizes",
    "empty_rows",
    "kept",
    "masks",
    "power_keep",
    "scores",
    "tensors",
]
