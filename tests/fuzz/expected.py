"""When it is right that a case is refused, and why it then has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from effattn.compiler.report.records import MissedReport
from effattn.ir.refusal import Why
from tests.fuzz.case import Case
from tests.fuzz.tables.fills import FILLS
from tests.fuzz.tables.hostile import HOSTILE
from tests.fuzz.tables.masks import MASKS


@dataclass(frozen=True)
class Refusal:
    """The rules that may be named, and the cases in which that is right; no rules: any."""

    rules: frozenset[str]
    right: Callable[[Case], bool]

    def allows(self, case: Case, missed: MissedReport) -> bool:
        return self.right(case) and (not self.rules or missed.rule in self.rules)


def _because(right: Callable[[Case], bool], *rules: Why) -> Refusal:
    return Refusal(frozenset(rules), right)


def rows_may_be_empty(case: Case) -> bool:
    """Whether the user's mask, seen without values, may hide a whole row."""
    mask = MASKS[case.mask]
    given = any(name == "lengths" or name.endswith("triangle") for name in mask.data)  # their values are not seen
    not_known_here = given or mask.only_values_tell or (mask.at_most and case.shapes != "static")
    return case.core in ("written", "sdpa") and (mask.rows_may_be_empty or not_known_here)


def _fill_rounds(case: Case) -> bool:
    return case.core == "written" and case.fill in FILLS and not FILLS[case.fill].exact


def _finite_fill(case: Case) -> bool:
    return "-inf" not in case.fill if case.core == "written" else case.sdpa_mask == "lowest"


def _adds_data(case: Case) -> bool:
    """Data that is added to the scores might mask, for all that the graph tells."""
    added = ("bias", "relative", "alibi", "table")
    return any(part in case.score for part in added) or case.product == "baddbmm, alibi"


def _all_exponentials_may_be_0(case: Case) -> bool:
    """Of a softmax by hand that does not subtract the largest score: NaN, whatever finite number masks."""
    return case.softmax == "by hand" and _finite_fill(case)


# not every multiple of the heads is a whole batch, for all that the graph tells
WHOLE_BATCHES = _because(
    lambda case: case.layout == "[N, BH, D]" and case.batches == "other",
    Why.OPERANDS, Why.SIZES, Why.HEADS, Why.SINK, Why.NO_PRODUCT,
)  # fmt: skip

REFUSALS = (
    _because(lambda case: "float64" in (case.dtype, case.softmax), Why.DTYPE, Why.NO_PRODUCT),
    _because(lambda case: case.changes_its_mask),
    _because(lambda case: case.keys == 1, Why.NOT_ATTENTION),  # nothing depends on which key it is
    # views cannot tell rows from heads
    _because(lambda case: case.queries == case.heads * case.groups == 1),
    WHOLE_BATCHES,
    # positions are int32 in FlexAttention's graph, and int64 where it runs eagerly
    _because(lambda case: case.mod == "large factors", Why.MOD),
    _because(lambda case: _finite_fill(case) and _adds_data(case), Why.ROWS_WITHOUT_KEYS),
    _because(
        lambda case: rows_may_be_empty(case)
        and (_fill_rounds(case) or case.sdpa_mask == "lowest" or _all_exponentials_may_be_0(case)),
        Why.ROWS_WITHOUT_KEYS,
    ),
)  # fmt: skip


def problem(case: Case, sites: int, missed: list[MissedReport], graphs: int) -> str:
    """What is wrong with the number of sites and the reasons of refusals in ``graphs``; "" if nothing is."""
    if case.core == "hostile":
        return _hostile(case, sites, missed, graphs)
    if not sites and not missed and case.keys == 1 and "by hand" in case.softmax:
        return ""  # no quotient of one number tells that it is a softmax
    if sites + len(missed) != graphs:
        return f"{sites} sites and {len(missed)} refusals of one attention: {_told(missed)}"
    for one in missed:
        if not any(row.allows(case, one) for row in REFUSALS):
            return f"not found: {_told([one])}"
    return ""


def _told(missed: list[MissedReport]) -> str:
    return "; ".join(f"{one.reason} ({one.rule})" for one in missed)


def _hostile(case: Case, sites: int, missed: list[MissedReport], graphs: int) -> str:
    row = HOSTILE[case.hostile]
    if row.found_or_refused:
        return ""
    if row.refusal is None:
        right = sites == row.sites * graphs and not missed
        right = right or (not sites and bool(missed) and all(WHOLE_BATCHES.allows(case, one) for one in missed))
        return "" if right else f"{sites} sites instead of {row.sites}, refused: {_told(missed)}"
    if sites:
        return f"found, and should not be: {sites} sites, refused: {_told(missed)}"
    if row.refusal and not any(row.refusal == one.rule for one in missed):
        return f"refused for another rule than {row.refusal!r}: {_told(missed)}"
    return ""
