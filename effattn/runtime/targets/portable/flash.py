"""Long calls by PyTorch's CPU flash kernel: keys that need no mask without one, all chunks of a strip at once.

A strip's keys are computed in up to three parts, whose results are added by their LSE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.runtime.targets.portable.call import Call
from effattn.runtime.targets.portable.shares import Planned, Share, shares
from effattn.runtime.targets.portable.strips import Keys, Strip
from effattn.runtime.targets.sdpa import widened_for_lse

LEAST_PAIRS = 2**20  # of query and key in a batch, all heads together: with fewer, batches are better computed at once


def worthwhile(call: Call) -> bool:
    """Whether a call is computed by strips rather than all batches at once."""
    return call.takes_flash_kernel() and call.bias == 0 and call.heads * call.q_len * call.k_len >= LEAST_PAIRS


@dataclass(frozen=True)
class Part:
    """Some keys of a strip, and the mask that they need."""

    keys: tuple[Keys, ...]
    causal: bool = False
    mask: Tensor | None = None  # [Hkv or 1, C or 1, G * rows, n], added to the scores
    hidden: Tensor | None = (
        None  # bool [Hkv or 1, C or 1, G, rows]: queries that see none of the keys, if there are any
    )


@dataclass(frozen=True)
class Work:
    """A strip of one batch.

    The kernel's heads are chunks, and the query heads of a group become rows, so that keys are not expanded. In a part
    that is causal its heads are the query heads.
    """

    share: Share
    batch: int
    strip: Strip
    parts: tuple[Part, ...]  # () if no query sees a key

    def rows(self, grouped: Tensor) -> Tensor:
        """Its queries in a tensor [B, Hkv, G, Nq, ...] as a view [Hkv, C, G, rows, ...]."""
        heads = self.share.kv_heads
        rows = grouped[self.batch, heads.start : heads.stop, :, self.strip.start : self.strip.stop]
        return rows.unflatten(2, (self.strip.chunks, self.strip.rows)).transpose(1, 2)

    def visited(self, tensor: Tensor, part: Part) -> Tensor:
        """The keys (or values) of a part, from [B, Hkv, Nk, D], as the kernel takes them; where possible as a view."""
        heads = self.share.kv_heads
        views = [_view(tensor[self.batch, heads.start : heads.stop], keys, self.strip.chunks) for keys in part.keys]
        found = views[0] if len(views) == 1 else torch.cat(views, dim=2)
        return found.expand(-1, self.share.groups, -1, -1) if part.causal else found

    def to_kernel(self, rows: Tensor, part: Part) -> Tensor:
        """A result of :meth:`rows` as the kernel takes it."""
        return rows[:, 0] if part.causal else rows.flatten(2, 3)

    def from_kernel(self, rows: Tensor, part: Part) -> Tensor:
        """The inverse of :meth:`to_kernel`."""
        return rows[:, None] if part.causal else rows.unflatten(2, (self.share.groups, self.strip.rows))


def work(call: Call) -> Iterator[Work]:
    """A call as strips, batch after batch."""
    for share in shares(call):
        for planned in share.planned():
            parts = tuple(_parts(share, planned))
            for batch in share.batches:
                yield Work(share, batch, planned.strip, parts)


def run(call: Call, out: Tensor, lse: Tensor, fill: Tensor) -> None:
    """Fill ``out`` and ``lse``, grouped by kv heads; ``fill`` [B, Hkv, 1, 1, Dv] is the output of queries without
    keys."""
    query, key, value = contiguous_rows(*widened_for_lse(call.plan, call.query, call.key, call.value))
    for one in work(call):
        out_rows, lse_rows = one.rows(out), one.rows(lse)
        heads = one.share.kv_heads
        instead = fill[one.batch, heads.start : heads.stop, None]
        if not one.parts:
            out_rows.copy_(instead.expand_as(out_rows))
            lse_rows.fill_(-torch.inf)
            continue
        rows = one.rows(query)
        result, result_lse = _attend(call, one, one.parts[0], rows, key, value)
        for part in one.parts[1:]:
            more, more_lse = _attend(call, one, part, rows, key, value)
            weight = torch.sigmoid(more_lse - result_lse).to(call.dtype)
            result = torch.lerp(result.to(call.dtype), more.to(call.dtype), weight[..., None])
            result_lse = torch.logaddexp(result_lse, more_lse)
        if (hidden := one.parts[0].hidden) is not None:
            result = torch.where(hidden[..., None], instead, result)
        out_rows.copy_(result)
        lse_rows.copy_(result_lse)


def contiguous_rows(*tensors: Tensor) -> Iterator[Tensor]:
    """Tensors as the kernel takes them."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


def _attend(call: Call, one: Work, part: Part, rows: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output [Hkv, C, G, rows, D] and LSE of one part."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        one.to_kernel(rows, part),
        one.visited(key, part),
        one.visited(value, part),
        0.0,
        part.causal,
        attn_mask=part.mask,
        scale=call.scale,
    )
    out, lse = one.from_kernel(out, part), one.from_kernel(lse, part)
    if part.hidden is not None:
        out, lse = out.masked_fill(part.hidden[..., None], 0.0), lse.masked_fill(part.hidden, -torch.inf)
    return out, lse


def _parts(share: Share, planned: Planned) -> Iterator[Part]:
    """The keys of a strip: the longest run without a mask, those that are kept causally, and all others.

    Every query sees keys of the first part, if there are more.
    """
    strip = planned.strip
    if strip.main is not None:
        yield Part((strip.main,))
    if strip.diagonal is not None:
        yield Part((strip.diagonal,), causal=True)
    beside = (*strip.free, *strip.tested)
    if not strip.tested:
        if beside:
            yield Part(beside)
        return
    kept = share.kept(strip) if planned.kept is None else planned.kept
    free = sum(keys.width for keys in strip.free)
    added = torch.zeros(*kept.shape[:-1], free + kept.shape[-1], dtype=share.dtype)
    added[..., free:].masked_fill_(~kept, -torch.inf)
    hidden = None if free else ~kept.any(dim=-1)
    mask = added.expand(-1, -1, share.groups, -1, -1).flatten(2, 3)
    yield Part(beside, mask=mask, hidden=hidden if hidden is not None and bool(hidden.any()) else None)


def _view(heads: Tensor, keys: Keys, chunks: int) -> Tensor:
    """[Hkv, Nk, D] as the keys of each chunk [Hkv, C, n, D]; these may overlap."""
    by_head, by_key, by_dim = heads.stride()
    shape = (heads.shape[0], chunks, keys.width, heads.shape[2])
    return heads.as_strided(
        shape, (by_head, keys.step * by_key, by_key, by_dim), heads.storage_offset() + keys.first * by_key
    )
