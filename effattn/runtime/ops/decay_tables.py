"""Validates the decay tables in a model's buffers against one rate per head.

    checked_decay(log_decay, rising, falling, triangles) -> log_decay

Lightning attention in blocks (arXiv 2405.17381, algorithm 1) multiplies queries by ``decay^(r + 1)``, keys by
``decay^(C - 1 - r)`` and scores by ``decay^(i - j)``. If these factors are data, ``effattn::linear`` is the same
function only while they are powers of one number. Every call validates this, since buffers can be written at any time.
If a table does not fit, the op raises on the CPU; on other devices an assertion fails there, without synchronising.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.errors import DecayChanged
from effattn.lowering.device import on_host
from effattn.runtime.ops.attend import NoGradient
from effattn.runtime.ops.registry import Op, register

SCHEMA = "(Tensor log_decay, Tensor[] rising, Tensor[] falling, Tensor[] triangles) -> Tensor"
_CHANGED = (
    "the decay tables of a linear attention are no longer powers of one rate per head, as they were when it was "
    "compiled: call torch._dynamo.reset(), and the model runs as the user wrote it"
)
_OF_EXP = 2 * torch.finfo(torch.float32).eps  # assumed error of a device's exp()


def checked_decay(
    log_decay: Tensor, rising: Sequence[Tensor], falling: Sequence[Tensor], triangles: Sequence[Tensor]
) -> Tensor:
    """A copy of ``log_decay``, after the tables have been validated against it.

    Args:
        log_decay: [H] float32, at most 0.
        rising: tables of H * C elements, ``exp((r + 1) * log_decay)``.
        falling: tables of H * C elements, ``exp((C - 1 - r) * log_decay)``.
        triangles: tables [..., H, C, C], ``exp((i - j) * log_decay)`` for j <= i and 0 for later keys.

    Raises:
        DecayChanged: on the CPU, if they do not hold these values.
    """
    fits = follow(log_decay, rising, falling, triangles)
    if not on_host(fits):
        torch._assert_async(fits, _CHANGED)
    elif not fits:
        raise DecayChanged(_CHANGED)
    return log_decay.clone()


def checked_decay_fake(log_decay, rising, falling, triangles):
    return torch.empty_like(log_decay)


def follow(
    log_decay: Tensor, rising: Sequence[Tensor], falling: Sequence[Tensor], triangles: Sequence[Tensor]
) -> Tensor:
    """Whether all tables follow ``log_decay``, up to rounding in their own dtype: 0-d bool."""
    heads, rates = log_decay.shape[0], log_decay.double()[:, None]
    fits = (log_decay <= 0).all()
    for up, tables in ((True, rising), (False, falling)):
        for table in tables:
            place = torch.arange(table.numel() // heads, device=table.device)
            low, high = _bounds(rates * (place + 1 if up else place.flip(0)), table.dtype)
            table = table.reshape(heads, -1)
            fits = fits & ((low <= table) & (table <= high)).all()
    for table in triangles:
        size = table.shape[-1]
        table = table.reshape(heads, size, size).flip(1)  # last row first: each row's bounds start one element later
        place = torch.arange(size - 1, -1, -1, device=table.device)
        beyond = (0, size - 1)  # later keys must have weight 0
        low, high = (F.pad(one, beyond).unfold(1, size, 1) for one in _bounds(rates * place, table.dtype))
        fits = fits & ((low <= table) & (table <= high)).all()
    return fits


def _bounds(exponent: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The interval of ``exp(exponent)`` in ``dtype``: both rate times distance and the power may have been rounded."""
    expected, kind = torch.exp(exponent), torch.finfo(dtype)
    slack = (kind.eps * (1 - exponent) + _OF_EXP) * expected + kind.tiny
    wide = torch.promote_types(dtype, torch.float32)
    return (expected - slack).to(wide), (expected + slack).to(wide)


def _setup_context(ctx, inputs, output) -> None:
    if inputs[0].requires_grad or any(table.requires_grad for tables in inputs[1:] for table in tables):
        raise NoGradient("effattn::checked_decay has no gradient: a decay that is learned is left to its user's code")


def _no_gradient(ctx, *grads):
    raise NoGradient("effattn::checked_decay has no gradient")


OPS = {"checked_decay": Op(SCHEMA, checked_decay, checked_decay_fake, _no_gradient, _setup_context)}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")
