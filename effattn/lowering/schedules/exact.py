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


# H200, bf16, heads 32/8, batch 1, against cuDNN's kernel in the same run, ms:
# D 128  8,448 tokens 0.96 and 1.08; 33,024 12.5 and 14.0; 131,328 234 and 247; the backward is 0.90, 1.04 and 1.13 of
#        cuDNN's time
# D 64   33,024 tokens 9.06 and 9.57; the backward 24.1 and 26.0
# D 256  33,024 tokens 26.3 and 28.2; there is no Gluon kernel for the backward
GENERATED: tuple[Faster, ...] = (
    Faster("sm90", ("causal",), ("bfloat16",), (128, 128), queries=8192),
    Faster("sm90", ("causal",), ("bfloat16",), (64, 64), queries=32768, training=True),
    Faster("sm90", ("causal",), ("bfloat16",), (256, 256), queries=32768),
)


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
