"""Conditions on data that depend on batch and key only (padding masks): a small kernel evaluates them before decoding.

For each of ``PARTS`` parts of the keys of a batch it writes the first allowed key, and one past the last. Every program
of the main kernel reduces these, and visits no tile outside. Elsewhere a block map says it.
"""

from __future__ import annotations

from effattn.ir.fold import fold
from effattn.lowering.dialects.triton.terms import KEYS, Lines, Source

PARTS = 32  # programs per batch; one warp reduces their results
KEYS_AT_ONCE = 1024


# the first lines of a kernel that reads the result; ``batch`` is defined
SUMS = (
    f"found = allowed + batch * {2 * PARTS} + tl.arange(0, {PARTS})",
    "allowed_first = tl.min(tl.load(found), 0)",
    f"allowed_end = tl.max(tl.load(found + {PARTS}), 0)",
)


def lines_and_keep(condition, symbols, captures) -> tuple[list[str], str]:
    """Source of ``condition`` for a vector ``keys``: the lines it needs, and the condition."""
    lines = Lines()
    algebra = Source(symbols, captures, lines, lines, key_mask="key_ok")
    return lines.lines, fold(condition, algebra).spread(KEYS)
