"""Conditions on data that depend on the key alone, as a padding mask does: found once a call, by a small kernel.

It writes, for each of ``PARTS`` parts of the keys of a batch row, the first allowed key, one past the last, and how
many are allowed. Every program of the main kernels adds these up: it visits no tile outside of them, and if the allowed
keys are consecutive it tests the data on none of the tiles inside.
"""

from __future__ import annotations

from effattn.ir.fold import fold
from effattn.lowering.dialects.triton.terms import KEYS, Lines, Source

PARTS = 32  # programs of a batch row; the lanes of one warp add up what they found
KEYS_AT_ONCE = 1024


def sums(whole: bool) -> list[str]:
    """The first lines of every kernel that reads what was found; ``batch`` is known.

    ``whole``: also whether the keys between the first and the last are all allowed, which decode does not ask.
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
    """Source of ``condition`` for a vector called ``keys``: lines that it needs, and the condition itself."""
    lines = Lines()
    algebra = Source(symbols, captures, lines, lines, key_mask="key_ok")
    return lines.lines, fold(condition, algebra).spread(KEYS)
