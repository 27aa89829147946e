"""Attention over a block list in ATen: a query block and the heads of one list at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.ir.plan import Plan
from effattn.lowering.device import device_type
from effattn.runtime.selection.block_list import BlockList
from effattn.runtime.selection.run import select
from effattn.runtime.targets.memory_order import allocate_output
from effattn.runtime.targets.portable.call import Call, empty_output
from effattn.runtime.targets.sdpa import widened_for_lse


@dataclass(frozen=True)
class Part:
    """Queries ``start <= q < stop`` of the query heads ``heads`` (all of one list) of one batch, and their keys."""

    batch: int
    heads: slice
    kv_heads: slice
    start: int
    stop: int
    keys: Tensor  # int64 [n], keys at the queries' own positions first
    taken: Tensor  # bool [heads or 1, n]: the keys that each head visits
    partial: int  # number of leading keys that need the causal mask


def run(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a plan with a selector, as ``effattn::attend`` defines them."""
    listed = select(plan, query, key, captures, scalars, numbers)
    call = Call(plan, query, key, value, captures, scalars, numbers)
    out, lse = allocate_output(plan, query, value)
    fill = empty_output(plan.spec, value, call.dtype)
    for part in parts(listed, call):
        result, result_lse = attend_part(call, part)
        groups = result.shape[0] // (part.kv_heads.stop - part.kv_heads.start)
        instead = fill[part.batch, part.kv_heads].repeat_interleave(groups, dim=0)
        empty = result_lse == -torch.inf
        out[part.batch, part.heads, part.start : part.stop] = torch.where(empty[..., None], instead[:, 0], result).to(
            out.dtype
        )
        lse[part.batch, part.heads, part.start : part.stop] = result_lse
    return out, lse


def parts(listed: BlockList, call: Call) -> Iterator[Part]:
    """The call in parts whose queries and heads read the same list."""
    lists = listed.kv_indices.shape[1]
    per_list, counted = call.heads // lists, listed.kv_num_blocks.shape[1] // lists
    within = torch.arange(listed.unit, device=call.device)
    width = listed.kv_indices.shape[3]

    def at(tensor: Tensor, place: int) -> Tensor:
        return tensor[place if tensor.shape[0] > 1 else 0]

    on_host = device_type(call.device.type).on_host  # on other devices, reading the counts would synchronise
    for batch in range(call.batch):
        for index in range(lists):
            heads = slice(index * per_list, (index + 1) * per_list)
            kv_heads = slice(heads.start // call.groups, -(-heads.stop // call.groups))
            counts = at(listed.kv_num_blocks, batch)[index * counted : (index + 1) * counted]
            counts = counts.repeat_interleave(per_list // counted, dim=0) if counted > 1 else counts
            for block in range(listed.kv_indices.shape[2]):
                most = int(counts[:, block].max()) if on_host else width
                units = at(listed.kv_indices, batch)[index, block, :most].long()
                taken = torch.arange(most, device=call.device) < counts[:, block, None]
                keys = (units[:, None] * listed.unit + within).flatten()
                taken = taken.repeat_interleave(listed.unit, dim=1) & (keys < call.k_len)
                partial = int(at(at(listed.partial, batch), index)[block]) * listed.unit if on_host else keys.numel()
                start = block * listed.block
                yield Part(
                    batch,
                    heads,
                    kv_heads,
                    start,
                    min(start + listed.block, call.q_len),
                    keys.clamp(0, call.k_len - 1),
                    taken,
                    partial,
                )


def attend_part(call: Call, part: Part) -> tuple[Tensor, Tensor]:
    """(out [heads, rows, Dv], lse [heads, rows]) of one part; lse is -inf for queries without keys."""
    heads, rows = part.heads.stop - part.heads.start, part.stop - part.start
    query = call.query.flatten(1, 2)[part.batch, part.heads, part.start : part.stop]
    key, value = (tensor[part.batch, part.kv_heads][:, part.keys] for tensor in (call.key, call.value))
    # the heads of one key head become rows of one product
    query = query.reshape(key.shape[0], -1, call.head_dim)
    compute = by_flash_kernel if call.takes_flash_kernel() and len(part.keys) else by_products
    out, lse = compute(call, part, query, key, value)
    return out.view(heads, rows, call.value_dim), lse.view(heads, rows)


def by_flash_kernel(call: Call, part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU flash kernel; bias and mask are its additive mask."""
    symbols = indices(call, part)
    kept = rule(call, part, symbols)
    added = torch.zeros(kept.shape, dtype=call.dtype)
    if call.bias != 0:
        added += call.evaluate(call.bias, {**symbols, "k": part.keys})
    added.masked_fill_(~kept, -torch.inf)
    query, key, value = widened_for_lse(call.plan, query, key, value)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], 0.0, False, attn_mask=added.view(1, *query.shape[:2], -1), scale=call.scale
    )
    empty = ~kept.any(dim=-1).view(query.shape[:2])
    return out[0], lse.view(query.shape[:2]).masked_fill(empty, -torch.inf)


def by_products(call: Call, part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Two products and a softmax, for any score."""
    query, key, value = (tensor.to(call.dtype) for tensor in (query, key, value))
    symbols = indices(call, part)
    kept = rule(call, part, symbols)
    raw = (query @ key.transpose(-1, -2)).view(kept.shape)
    score = call.evaluate(call.plan.spec.score, {**symbols, "k": part.keys, "s": raw}).masked_fill(~kept, -torch.inf)
    score = score.view(*query.shape[:2], -1)
    lse = score.logsumexp(dim=-1)
    weights = (score - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
    return weights @ value, lse


def indices(call: Call, part: Part) -> dict[str, Any]:
    """Values of the symbols but ``s`` and ``k``; they broadcast against [heads, rows, n]."""
    return {
        **call.names,
        "Nq": call.q_len,
        "Nk": call.k_len,
        "b": part.batch,
        "h": torch.arange(part.heads.start, part.heads.stop, device=call.device).view(-1, 1, 1),
        "q": torch.arange(part.start, part.stop, device=call.device).view(-1, 1),
    }


def rule(call: Call, part: Part, symbols: dict[str, Any]) -> Tensor:
    """The pairs that are kept: bool [heads, rows, n]. The causal mask is evaluated only on leading keys."""
    heads, rows = part.heads.stop - part.heads.start, part.stop - part.start
    kept = part.taken[:, None, :].expand(heads, -1, -1).repeat(1, rows, 1)
    kept[..., : part.partial] &= call.evaluate(call.tile_ranges.structural, {**symbols, "k": part.keys[: part.partial]})
    if call.tile_ranges.residual != sympy.true:
        kept &= call.evaluate(call.tile_ranges.residual, {**symbols, "k": part.keys})
    return kept
