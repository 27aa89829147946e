"""Output and LSE of any plan, in ATen, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effattn.ir.plan import Plan
from effattn.lowering.device import on_host
from effattn.runtime.targets.memory_order import allocate_output
from effattn.runtime.targets.portable import flash, listed
from effattn.runtime.targets.portable.call import OF_DROPOUT, Call, Piece, dropped_mean, empty_output
from effattn.runtime.targets.sdpa import widened_for_lse


def run(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a plan, as ``effattn::attend`` defines them. Scores are computed in float32 (or float64)."""
    if plan.sparsity.select is not None:
        return listed.run(plan, query, key, value, captures, scalars, numbers)
    live_blocks = 1 + (OF_DROPOUT if plan.spec.dropout else 0)
    call = Call(plan, query, key, value, captures, scalars, numbers, live_blocks=live_blocks)
    out, lse = allocate_output(plan, query, value)
    grouped_out, grouped_lse = call.by_group(out), call.by_group(lse)
    fill = empty_output(plan.spec, value, call.dtype)
    if flash.worthwhile(call):
        flash.run(call, grouped_out, grouped_lse, fill)
        return out, lse
    compute = by_flash_kernel if call.takes_flash_kernel() else by_products
    for piece in call.pieces():
        out_rows, lse_rows = call.rows(grouped_out, piece), call.rows(grouped_lse, piece)
        if not piece.chunk.runs:
            out_rows.copy_(_without_keys(call, piece, fill, out_rows))
            lse_rows.fill_(-torch.inf)
            continue
        result, result_lse, empty = compute(call, piece)
        if empty is not None:
            result = torch.where(empty[..., None], _without_keys(call, piece, fill, out_rows, empty), result)
            result_lse = torch.where(empty, -torch.inf, result_lse)
        out_rows.copy_(result)
        lse_rows.copy_(result_lse)
    return out, lse


def _without_keys(call: Call, piece: Piece, fill: Tensor, like: Tensor, empty: Tensor | None = None) -> Tensor:
    """The output of the queries of a piece that have no keys, ``like`` its output; ``empty``: which these are."""
    spec, nobody = call.plan.spec, empty is not None and on_host(empty) and not empty.any()
    if spec.dropout and spec.empty_output == "mean" and not nobody:
        return dropped_mean(call, piece, like)
    return fill[piece.batches, piece.kv_heads].expand_as(like)


def by_products(call: Call, piece: Piece) -> tuple[Tensor, Tensor, Tensor | None]:
    """One piece as two products and a softmax: (out [b, hkv, G, rows, Dv], lse, which queries have no keys)."""
    query, key = call.rows(call.query, piece).to(call.dtype), call.visited(call.key, piece).to(call.dtype)
    score, _ = call.scores(piece, query, key)
    top = score.amax(dim=-1)
    weights = score.softmax(dim=-1)
    # the greatest weight is exp(top - lse), which saves another pass of exp and sum
    lse = top - weights.amax(dim=-1).log()
    weights = call.dropout(piece)(weights)
    out = (weights.flatten(2, 3) @ call.visited(call.value, piece).to(call.dtype)).unflatten(2, weights.shape[2:4])
    return out, lse, top == -torch.inf


def by_flash_kernel(call: Call, piece: Piece) -> tuple[Tensor, Tensor, Tensor | None]:
    """One piece by PyTorch's CPU flash kernel; bias and mask are its additive mask."""
    query, key, value = call.rows(call.query, piece), call.visited(call.key, piece), call.visited(call.value, piece)
    shape = query.shape
    added = call.additive(piece)
    # groups become rows, so that k and v are not expanded and the kernel has larger tiles
    query = query.flatten(2, 3)
    mask = None if added is None else added.expand(-1, -1, shape[2], -1, -1).flatten(2, 3)
    query, key, value = widened_for_lse(call.plan, query, key, value)
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=call.scale
    )
    return out.view(shape), lse.unflatten(2, shape[2:4]), call.empty_rows(piece, added)
