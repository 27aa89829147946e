"""Gradients of long calls by PyTorch's CPU flash kernel, strip by strip as in :mod:`.flash`.

The kernel recomputes weights from the LSE, so with the LSE and the output over all keys it gives the exact gradients of
each part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.runtime.targets.portable.call import Call
from effattn.runtime.targets.portable.flash import Part, Work, contiguous_rows, work


def run(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
) -> None:
    """Fill ``grad_query`` and add to ``grad_key`` and ``grad_value`` [B, Hkv, Nk, D].

    All others are grouped by kv heads. Queries without keys have zero gradients.
    """
    query, key, value = contiguous_rows(call.query, call.key, call.value)
    grad_out, out = contiguous_rows(grad_out.to(query.dtype), out.to(query.dtype))
    for one in work(call):
        of_query = one.rows(grad_query)
        if not one.parts:
            of_query.zero_()
            continue
        rows = [one.rows(tensor) for tensor in (query, grad_out, out, lse)]
        empty = rows[3] == -torch.inf
        if bool(empty.any()):  # their output may be NaN, and no weight is to be left of their scores
            rows[2] = rows[2].masked_fill(empty[..., None], 0.0)
            rows[3] = rows[3].masked_fill(empty, torch.inf)
        total, *others = (_part(call, one, part, rows, key, value, grad_key, grad_value) for part in one.parts)
        for found in others:
            total = total.to(call.dtype) + found
        of_query.copy_(total)


def _part(
    call: Call,
    one: Work,
    part: Part,
    rows: list[Tensor],
    key: Tensor,
    value: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> Tensor:
    """The gradient [Hkv, C, G, rows, D] of a strip's queries from one part; adds those of its keys and values."""
    query, grad_out, out, lse = (one.to_kernel(tensor, part) for tensor in rows)
    of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out,
        query,
        one.visited(key, part),
        one.visited(value, part),
        out,
        lse,
        0.0,
        part.causal,
        attn_mask=part.mask,
        scale=call.scale,
    )
    for total, found in ((grad_key, of_key), (grad_value, of_value)):
        found = found.sum(dim=1, keepdim=True) if part.causal else found
        heads, column = total[one.batch, one.share.kv_heads.start : one.share.kv_heads.stop], 0
        for keys in part.keys:
            for chunk in range(one.strip.chunks):
                start, stop = keys.of(chunk)
                heads[:, start:stop] += found[:, chunk, column : column + keys.width]
            column += keys.width
    return one.from_kernel(of_query, part)
