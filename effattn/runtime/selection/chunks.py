"""Chunks of keys: their boundaries, their means, and the tokens taken from them within a budget (DHSA v1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.ir.selector import BOUNDARIES, Chunks, Mean, Pick, Tokens, Trained
from effattn.runtime.selection.places import Places
from effattn.runtime.selection.predictor import cuts, most_cuts

FAR = 1.0e38  # greater than any score


@dataclass(frozen=True)
class Cut:
    """The start and end of each chunk, int64 [B, C]. Both are N past the last chunk."""

    start: Tensor
    stop: Tensor

    @property
    def sizes(self) -> Tensor:
        return self.stop - self.start


def cut(piece: Chunks | Trained | Mean, key: Tensor, pooled: Tensor, captures: dict[str, Tensor]) -> Cut:
    """The chunks of ``key`` [B, Hkv, N, D]; ``pooled`` is its mean over heads, [B, 1, N, D]."""
    batch, _, length, _ = key.shape
    if isinstance(piece, Mean):
        start = torch.arange(0, length, piece.size, device=key.device)
        return Cut(start.expand(batch, -1), (start + piece.size).clamp(max=length).expand(batch, -1))
    if isinstance(piece, Chunks) and piece.find == "given":
        begins, most = captures[BOUNDARIES][:, :length].to(torch.bool), length
    elif isinstance(piece, Trained):
        begins, most = cuts(piece, key), min(most_cuts(piece, length) + 1, length)
    else:
        begins, most = dips(piece, pooled[:, 0]), length // piece.apart + 2
    first = torch.arange(length, device=key.device) == 0
    number = (begins | first).cumsum(dim=1) - 1
    start = torch.full((batch, most + 1), length, dtype=torch.int64, device=key.device)
    places = torch.arange(length, device=key.device).expand(batch, -1)
    start = start.scatter_reduce(1, number.clamp(max=most), places, "amin")
    return Cut(start[:, :-1], start[:, 1:])


def dips(piece: Chunks, key: Tensor) -> Tensor:
    """Tokens where the keys on either side are least alike: bool [B, N] from [B, N, D].

    The published predictor feeds this cosine, among other features, to a trained network, and suppresses boundaries
    near an accepted one in a loop (DHSA v1, section 2.1). Here a dip is accepted if it is the minimum within ``apart``
    tokens, which needs no loop. Ties go to the first.
    """
    batch, length, _ = key.shape
    width, apart = piece.width, piece.apart
    if length < 2 * width + 1:
        return torch.zeros(batch, length, dtype=torch.bool, device=key.device)
    windows = F.avg_pool1d(key.float().transpose(1, 2), width, stride=1).transpose(1, 2)  # [B, N - width + 1, D]
    alike = F.cosine_similarity(windows[:, : length - 2 * width + 1], windows[:, width:], dim=-1)
    alike = F.pad(
        alike, (width, width - 1), value=torch.inf
    )  # entry t compares t - width .. t - 1 with t .. t + width - 1
    least = -F.max_pool1d(-alike[:, None], 2 * apart + 1, stride=1, padding=apart)[:, 0]
    found = (alike == least) & (alike < piece.threshold)
    # of equal minima within ``apart``, only the first
    earlier = F.pad(found.float(), (apart, 0))[:, None]
    taken_before = F.max_pool1d(earlier, apart, stride=1)[:, 0, :length] > 0
    return found & ~taken_before


def chunk_means(piece: Chunks | Trained | Mean, key: Tensor, chunks: Cut) -> Tensor:
    """Means of the keys [B, 1, N, D] of each chunk, zero for empty chunks: float32 [B, 1, C, D]."""
    sizes = chunks.sizes
    sums = torch.stack(
        [
            torch.segment_reduce(keys.float(), "sum", lengths=lengths, axis=0, unsafe=True)
            for keys, lengths in zip(key[:, 0], sizes, strict=True)
        ]
    )
    wide = sizes.clamp(min=1).float()[..., None]
    return (sums / (wide.sqrt() if piece.root_length else wide))[:, None]


def tokens_of(scores: Tensor, chunks: Cut, pick: Pick, places: Places) -> tuple[Tensor, Tensor]:
    """The tokens that each query block visits, from chunk scores [B, 1, M, C].

    Returns:
        order, int32 [B, 1, M, T], and its count, int32 [B, 1, M]: the most recent ``local`` tokens, the sinks, then the
        best chunks within the budget, each from its end. No token is listed twice.
    """
    assert isinstance(pick.budget, Tokens)
    limit = places.eligible[:, None]  # tokens before it are visible to some query of the block: [M, 1]
    budget = min(pick.budget.tokens, places.units)
    local, sinks = min(pick.local, budget), min(pick.sinks, max(budget - pick.local, 0))
    recent = (limit - local).clamp(min=0)
    start = chunks.start[:, None, None].clamp(min=sinks)
    stop = torch.minimum(chunks.stop[:, None, None], recent)
    sizes = (stop - start).clamp(min=0)  # [B, 1, M, C]
    keyed = scores.nan_to_num(nan=-FAR, posinf=FAR, neginf=-FAR).masked_fill(sizes == 0, -torch.inf)
    best = scores.shape[-1] - 1 - keyed.flip(-1).argsort(dim=-1, descending=True, stable=True)
    sizes = sizes.gather(-1, best)
    ends = sizes.cumsum(dim=-1)

    slot = torch.arange(budget, device=scores.device)
    of_sinks = recent.clamp(max=sinks)  # [M, 1]
    place = (slot - local - of_sinks).clamp(min=0).expand(*ends.shape[:-1], -1).contiguous()
    chosen = torch.searchsorted(ends, place, right=True).clamp(max=ends.shape[-1] - 1)
    chunk = best.gather(-1, chosen)
    within = place - (ends - sizes).gather(-1, chosen)
    picked = stop.expand_as(scores).gather(-1, chunk) - 1 - within
    order = torch.where(slot < local, limit - 1 - slot, torch.where(slot < local + of_sinks, slot - local, picked))
    count = limit.clamp(max=budget)[:, 0]
    return order.to(torch.int32), count.to(torch.int32).expand(scores.shape[0], 1, -1)
