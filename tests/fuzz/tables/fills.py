"""How a mask gets into the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fill:
    """``put(scores, seen)`` -> scores with what stands where a key is not seen.

    ``exact``: what a row without keys holds does not depend on rounding: all -inf, or all the same number.
    """

    put: Callable
    exact: bool = True


INF = float("inf")


def _lowest(s):
    return torch.finfo(s.dtype).min


def _added(value: float | None):
    def put(s, seen):
        low = _lowest(s) if value is None else value
        return s + torch.zeros_like(seen, dtype=s.dtype).masked_fill(~seen, low)

    return put


FILLS: dict[str, Fill] = {
    "where -inf": Fill(lambda s, seen: torch.where(seen, s, -INF)),
    "where lowest": Fill(lambda s, seen: torch.where(seen, s, _lowest(s))),
    "where lowest, a tensor": Fill(lambda s, seen: torch.where(seen, s, torch.full([], _lowest(s), dtype=s.dtype))),
    "where, the other way": Fill(lambda s, seen: torch.where(~seen, torch.tensor(-INF, dtype=s.dtype), s)),
    "filled -inf": Fill(lambda s, seen: s.masked_fill(~seen, -INF)),
    "filled in place": Fill(lambda s, seen: s.clone().masked_fill_(seen.logical_not(), -INF)),
    "filled lowest": Fill(lambda s, seen: s.masked_fill(seen == 0, _lowest(s))),
    "filled -1e9": Fill(lambda s, seen: s.float().masked_fill(seen == 0, -1e9)),
    "filled -1e4": Fill(lambda s, seen: s.masked_fill(~seen, -10000.0)),
    "added -inf": Fill(_added(-INF)),
    "added lowest": Fill(_added(None), exact=False),
    "added lowest of ones": Fill(lambda s, seen: s + (1.0 - seen.to(s.dtype)) * _lowest(s), exact=False),
    "added where": Fill(lambda s, seen: s + torch.where(seen, 0.0, -INF).to(s.dtype)),
    "added -1e4": Fill(lambda s, seen: s + (1.0 - seen.to(s.dtype)) * -10000.0, exact=False),
    "added twice": Fill(
        lambda s, seen: s + torch.where(seen, 0.0, -INF).to(s.dtype) + torch.where(seen, 0.0, -INF).to(s.dtype)
    ),
    "multiplied": Fill(lambda s, seen: s.float() * seen - 1e9 * (1 - seen.float()), exact=False),
}
