"""Gradients of any plan whose score is differentiable in s: recomputed chunk by chunk in ATen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from effattn.ir.derivative import derivative
from effattn.ir.plan import Plan
from effattn.runtime.targets.empty_rows import add_empty_rows
from effattn.runtime.targets.memory_order import allocate
from effattn.runtime.targets.portable import flash, flash_backward
from effattn.runtime.targets.portable.call import OF_DROPOUT, Call, Piece
from effattn.runtime.targets.portable.captured import Captured
from effattn.runtime.targets.target import Gradients

LIVE_BLOCKS = 4  # blocks of scores in memory at a time: scores, weights and both gradients
OF_CAPTURES = 3  # more: the gradient of a captured tensor, and int64 places of its elements


def run_backward(
    plan: Plan,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
    wanted: Sequence[str] = (),
) -> Gradients:
    """Gradients of query, key, value and the captured tensors in ``wanted``; ``out`` and ``lse`` are the forward's.

    Queries without keys: see :func:`effattn.runtime.targets.empty_rows.add_empty_rows`.
    """
    live_blocks = LIVE_BLOCKS + (OF_CAPTURES if wanted else 0) + (OF_DROPOUT if plan.spec.dropout else 0)
    call = Call(plan, query, key, value, captures, scalars, numbers, live_blocks=live_blocks)
    captured = Captured(call, wanted)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    through_lse = None if grad_lse is None else call.by_group(grad_lse.to(call.dtype))
    grad_query = allocate(plan.dispatch.layout, query, query.shape)
    grad_key = torch.zeros(key.shape, dtype=call.dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=call.dtype, device=value.device)
    grouped_grad, grouped_out, grouped_lse = call.by_group(grad_out), call.by_group(out), call.by_group(lse)
    grouped_grad_query = call.by_group(grad_query)

    # the kernel takes weights from the LSE, which is float32, and has no gradient through it
    if through_lse is None and call.dtype == torch.float32 and flash.worthwhile(call):
        given = (grouped_grad, grouped_out, grouped_lse, grouped_grad_query, grad_key, grad_value)
        flash_backward.run(call, *given)
        pieces: Iterable[Piece] = ()
    else:
        pieces = call.pieces()
    for piece in pieces:
        query_grad_rows = call.rows(grouped_grad_query, piece)
        if not piece.chunk.runs:
            query_grad_rows.zero_()
            continue
        grad_rows = call.rows(grouped_grad, piece).to(call.dtype)
        # a query's weights sum to one, so the gradients of its scores sum to the gradient of its LSE
        correction = (grad_rows * call.rows(grouped_out, piece).to(call.dtype)).sum(dim=-1)
        empty = call.rows(grouped_lse, piece) == -torch.inf
        correction = correction.masked_fill(empty, 0.0)  # the output of such a query may be NaN
        through = None if through_lse is None else call.rows(through_lse, piece).masked_fill(empty, 0.0)
        of_query, of_key, of_value = _piece(call, piece, grad_rows, correction, through, empty, captured)
        query_grad_rows.copy_(of_query)
        _add_visited(grad_key, of_key, piece)
        _add_visited(grad_value, of_value, piece)

    grads = (grad_query, grad_key, grad_value, captured.results())
    given, data = (grad_out, query, key, value, out, lse), (captures, scalars, numbers)
    add_empty_rows(plan, grads, run_backward, given, data, wanted)
    of_key, of_value = (
        allocate(plan.dispatch.layout, like, like.shape).copy_(grad)
        for like, grad in ((key, grad_key), (value, grad_value))
    )
    return grad_query, of_key, of_value, grads[3]


def _piece(
    call: Call,
    piece: Piece,
    grad_rows: Tensor,
    correction: Tensor,
    through: Tensor | None,
    empty: Tensor,
    captured: Captured,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one piece: queries [b, hkv, G, rows, D], and the keys and values that it visits."""
    query = call.rows(call.query, piece).to(call.dtype)
    key, value = (call.visited(tensor, piece).to(call.dtype) for tensor in (call.key, call.value))
    score, symbols = call.scores(piece, query, key)
    shape = query.shape[2:4]
    weights = score.softmax(dim=-1).masked_fill_(empty[..., None], 0.0)

    flat_grad, drop = grad_rows.flatten(2, 3), call.dropout(piece)
    of_value = drop(weights).flatten(2, 3).transpose(-1, -2) @ flat_grad
    of_score = drop((flat_grad @ value.transpose(-1, -2)).unflatten(2, shape))
    if captured.reads:  # rounded as these products are, or sums of gradients times scores would not cancel
        correction = (of_score * weights).sum(dim=-1)
    if through is not None:
        correction = correction - through
    of_score.sub_(correction[..., None]).mul_(weights)
    captured.add(piece, of_score, weights, symbols)
    if call.only_scale is not None:
        of_raw = of_score.mul_(call.only_scale)
    else:
        slope = call.evaluate(derivative(call.plan.spec.score), symbols)
        # the slope of a masked score may be anything, even infinite
        of_raw = torch.where(weights == 0, 0.0, of_score * slope)
    of_raw = of_raw.flatten(2, 3)
    of_query = (of_raw @ key).unflatten(2, shape)
    of_key = of_raw.transpose(-1, -2) @ query.flatten(2, 3)
    return of_query, of_key, of_value


def _add_visited(total: Tensor, part: Tensor, piece: Piece) -> None:
    """Add the gradient of the visited keys [b, hkv, n, D] to their places in ``total`` [B, Hkv, Nk, D]."""
    heads, column = total[piece.batches, piece.kv_heads], 0
    for start, stop in piece.chunk.slices():
        heads[:, :, start:stop] += part[:, :, column : column + stop - start]
        column += stop - start
