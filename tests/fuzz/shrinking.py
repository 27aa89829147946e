"""A failing case made plain: every row that does not matter is replaced by the plainest one."""

from __future__ import annotations

import re
from dataclasses import fields, replace

from tests.fuzz.case import UNUSED, Case
from tests.fuzz.trial import run

SMALLER = {
    **dict.fromkeys(("batch", "heads", "groups"), (1,)),
    **dict.fromkeys(("queries", "keys"), (2, 5)),
    **dict.fromkeys(("width", "value_width"), (4,)),
}


def smallest(case: Case, problem: str) -> Case:
    """The plainest case with the same problem that one change after the other leads to."""
    plain, kind = Case(), _kind(problem)
    for field in fields(Case):
        value = getattr(case, field.name)
        for other in (*SMALLER.get(field.name, ()), getattr(plain, field.name)):
            if value in (other, UNUSED):
                continue
            simpler = replace(case, **{field.name: other})
            if _kind(run(simpler).problem) == kind:
                case = simpler
                break
    return case


def _kind(problem: str) -> str:
    return re.sub(r"[^a-zA-Z ]", "", problem)[:40]
