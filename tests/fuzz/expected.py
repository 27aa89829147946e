"""When it is right that a case is refused, and why it then has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz.case import Case
from tests.fuzz.hostile import HOSTILE
from tests.fuzz.masks import FILLS, MASKS


@dataclass(frozen=True)
class Refusal:
    """A reason, or a part of one, and the cases in which it is right."""

    reason: str
    right: Callable[[Case], bool]


def rows_may_be_empty(case: Case) -> bool:
    """Whether the author's mask, seen without values, may hide a whole row."""
    return case.core in ("written", "sdpa") and MASKS[case.mask].rows_may_be_empty


def _fill_rounds(case: Case) -> bool:
    return case.core == "written" and case.fill in FILLS and not FILLS[case.fill].exact


REFUSALS = (
    Refusal("attention in torch.float64 is not supported", lambda case: case.dtype == "float64"),
    Refusal(
        "a row may attend to nothing",
        lambda case: rows_may_be_empty(case) and (_fill_rounds(case) or case.sdpa_mask == "lowest"),
    ),
)


def problem(case: Case, sites: int, reasons: list[str], graphs: int) -> str:
    """What is wrong with the number of sites and the reasons of refusals in ``graphs``; "" if nothing is."""
    if case.core == "hostile":
        return _hostile(case, sites, reasons, graphs)
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
