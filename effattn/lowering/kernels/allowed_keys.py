"""Conditions on data that depend on batch and key only (padding masks): a small kernel evaluates them once per call.

Decode and the backward read the result; in prefill a block map says it. For each of ``PARTS`` parts of the keys of a
batch it writes the first allowed key, one past the last, and the number of allowed keys. Every program of the main
kernels reduces these. It visits no tile outside the allowed range, and if the allowed keys are consecutive it does not
test the data inside.
"""

from __future__ import annotations

from effattn.ir.fold import fold
from effattn.lowering.dialects.triton.terms import KEYS, Lines, Source

PARTS = 32  # programs per batch; one warp reduces their results
KEYS_AT_ONCE = 1024


def sums(whole: bool) -> list[str]:
    """The first lines of every kernel that reads the result; ``batch`` is defined.

    ``whole``: also whether all keys from the first to the last are allowed, which decode does not use.
    """
    found = [
        f"found = allowed + batch * {3 * PARTS} + tl.arange(0, {PARTS})",
        "allowed_first = tl.min(tl.load(found), 0)",
        f"allowed_end = tl.max(tl.load(found + {PARTS}), 0)",
    ]
    if whole:
        found.append(
            f"allowed_whole = tl.sum(tl.load(found + {2 * PARTS}), 0) == allowed_end - allowed_first  # no gaps"
        )
    return found


def lines_and_keep(condition, symbols, captures) -> tuple[list[str], str]:
    """Source of ``condition`` for a vector ``keys``: the lines it needs, and the condition."""
    lines = Lines()
    algebra = Source(symbols, captures, lines, lines, key_mask="key_ok")
    return lines.lines, fold(condition, algebra).spread(KEYS)
