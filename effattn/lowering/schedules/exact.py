"""Which kernel computes attention that SDPA's kernels compute too: theirs, unless a generated one measured faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["all", "causal"]  # every key, or k <= q with as many queries as keys


@dataclass(frozen=True)
class Faster:
    """Where a generated kernel is faster than SDPA's."""

    architecture: str  # "sm90", ...
    kinds: tuple[Kind, ...]
    dtypes: tuple[str, ...]  # torch's names: "bfloat16"
    head_dims: tuple[int, int]  # the least and greatest
    queries: int = 0  # from this many on
    training: bool = False  # also with the backward, which is then a generated kernel's


GENERATED: tuple[Faster, ...] = ()


def generated_is_faster(
    kind: Kind, architecture: str, dtype: str, head_dim: int, queries: int, training: bool = False
) -> bool:
    """Whether a generated kernel measured faster. ``training``: together with its backward."""
    return any(
        row.architecture == architecture
        and kind in row.kinds
        and dtype in row.dtypes
        and row.head_dims[0] <= head_dim <= row.head_dims[1]
        and queries >= row.queries
        and (row.training or not training)
        for row in GENERATED
    )
