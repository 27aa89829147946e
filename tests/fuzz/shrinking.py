"""A failing case made plain: every row that does not matter is replaced by the plainest one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace

from tests.fuzz.case import UNUSED, Case
from tests.fuzz.trial import run

SMALLER = {
    **dict.fromkeys(("batch", "heads", "groups"), (1,)),
    **dict.fromkeys(("queries", "keys"), (2, 5, 17)),
    **dict.fromkeys(("width", "value_width"), (4,)),
}


def simpler(case: Case, problem: str) -> Iterator[Case | None]:
    """Plainer and plainer cases with the same problem, one change after the other; None after one that has it not."""
    plain, kind = Case(), _kind(problem)
    if "CUDA error" in problem:
        return  # whatever runs after it in this process fails too
    for field in fields(Case):
        value = getattr(case, field.name)
        for other in (*SMALLER.get(field.name, ()), getattr(plain, field.name)):
            if field.name == "target" or value in (other, UNUSED) or (type(value) is int and value < other):
                continue
            changed = replace(case, **{field.name: other})
            if _kind(run(changed).problem) == kind:
                case = changed
                yield case
                break
            yield None


def _kind(problem: str) -> str:
    return re.sub(r"[^a-zA-Z ]", "", problem)[:40]
