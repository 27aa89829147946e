"""When it is right that a case is refused, and why it then has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz.case import Case
from tests.fuzz.fills import FILLS
from tests.fuzz.hostile import HOSTILE
from tests.fuzz.masks import MASKS


@dataclass(frozen=True)
class Refusal:
    """A reason, or a part of one, and the cases in which it is right."""

    reason: str
    right: Callable[[Case], bool]


def rows_may_be_empty(case: Case) -> bool:
    """Whether the user's mask, seen without values, may hide a whole row."""
    mask = MASKS[case.mask]
    not_known_here = "lengths" in mask.data or (mask.at_most and case.shapes != "static")
    return case.core in ("written", "sdpa") and (mask.rows_may_be_empty or not_known_here)


def _fill_rounds(case: Case) -> bool:
    return case.core == "written" and case.fill in FILLS and not FILLS[case.fill].exact


def _finite_fill(case: Case) -> bool:
    return "-inf" not in case.fill if case.core == "written" else case.sdpa_mask == "lowest"


def _adds_data(case: Case) -> bool:
    """Data that is added to the scores might mask, for all that the graph tells."""
    added = ("bias", "relative", "alibi", "table")
    return any(part in case.score for part in added) or case.product == "baddbmm, alibi"


def _batch_and_heads_are_one_symbol(case: Case) -> bool:
    return case.layout == "[N, BH, D]" and case.batches == "other"


REFUSALS = (
    Refusal("torch.float64", lambda case: "float64" in (case.dtype, case.softmax)),
    Refusal("float stands between the product", lambda case: case.dtype == "float64"),
    Refusal("and data is added that may mask too", lambda case: _finite_fill(case) and _adds_data(case)),
    Refusal("", lambda case: case.changes_its_mask),
    Refusal("not attention", lambda case: case.keys == 1),  # nothing depends on which key it is
    Refusal("", lambda case: case.queries == case.heads * case.groups == 1),  # views cannot tell rows from heads
    # not every multiple of the heads is a whole batch, for all that the graph tells
    Refusal("the layout of", _batch_and_heads_are_one_symbol),
    Refusal("is a symbolic size", _batch_and_heads_are_one_symbol),
    # positions are int32 in FlexAttention's graph, and int64 where it runs eagerly
    Refusal("too large for torch.int32", lambda case: case.mod == "large factors"),
    Refusal(
        "a row may attend to nothing",
        lambda case: rows_may_be_empty(case) and (_fill_rounds(case) or case.sdpa_mask == "lowest"),
    ),
)


def problem(case: Case, sites: int, reasons: list[str], graphs: int) -> str:
    """What is wrong with the number of sites and the reasons of refusals in ``graphs``; "" if nothing is."""
    if case.core == "hostile":
        return _hostile(case, sites, reasons, graphs)
    if not sites and not reasons and case.keys == 1 and "by hand" in case.softmax:
        return ""  # no quotient of one number tells that it is a softmax
    if sites + len(reasons) != graphs:
        return f"{sites} sites and {len(reasons)} refusals of one attention: {reasons}"
    for reason in reasons:
        if not any(row.reason in reason and row.right(case) for row in REFUSALS):
            return f"not found: {reason}"
    return ""


def _hostile(case: Case, sites: int, reasons: list[str], graphs: int) -> str:
    row = HOSTILE[case.hostile]
    if row.found_or_refused:
        return ""
    if row.refusal is None:
        right = sites == row.sites * graphs and not reasons
        return "" if right else f"{sites} sites instead of {row.sites}, refused: {reasons}"
    if sites:
        return f"found, and should not be: {sites} sites, refused: {reasons}"
    if not any(row.refusal in reason for reason in reasons):
        return f"refused for another reason than {row.refusal!r}: {reasons}"
    return ""
