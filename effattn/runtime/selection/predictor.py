"""A trained predictor of chunk boundaries (DHSA v1, arXiv 2510.24606; the authors' ``predict_boundaries``).

For every gap between two tokens, the keys of the ``window`` tokens on either side go through one self-attention and a
layer norm. The means of both halves, their difference, product and cosine go through two linear layers. Everything is
computed in float32, in pieces of the sequence, without synchronising.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.ir.selector import Trained
from effattn.lowering.device import on_host
from effattn.lowering.forms.boundary_weights import POOL, Predictor, on_device

ELEMENTS = 2**24  # most elements of the windows of one piece
MOST = 2**15  # most windows of one piece; some SDPA kernels do not accept larger batches
ROUNDS = 32  # of suppression
COSINE_EPS = 1e-6


def cuts(piece: Trained, key: Tensor) -> Tensor:
    """Which of the keys [B, Hkv, N, D] (positions encoded) begin a chunk: bool [B, N].

    Raises:
        WeightsError: the file has changed since the plan was made, or does not fit these keys.
    """
    _, kv_heads, length, dim = key.shape
    predictor = on_device(piece.weights, piece.digest, piece.layer, kv_heads, dim, key.device)
    if length < 2 * predictor.window:
        return torch.zeros(key.shape[0], length, dtype=torch.bool, device=key.device)
    with torch.autocast(key.device.type, enabled=False):
        found = logits(predictor, key)
    place = torch.arange(length, device=key.device)
    inside = (place >= predictor.window - 1) & (place < length - predictor.window)  # both windows are in the sequence
    score = found.masked_fill(~(inside & (found > piece.threshold)), -torch.inf)
    last = suppress(score, piece.apart, most_cuts(piece, length))
    return F.pad(last, (1, 0))[:, :length]  # index t is the gap after token t; a chunk begins at t + 1


def most_cuts(piece: Trained, length: int) -> int:
    """The largest number of chunks that begin after the first."""
    return max(length // piece.block, 1) * piece.per_block


def logits(predictor: Predictor, key: Tensor) -> Tensor:
    """The logit of a boundary after each of the keys [B, Hkv, N, D]: float32 [B, N]."""
    weights, window = predictor.tensors, predictor.window
    batch, _, length, _ = key.shape
    tokens = key.transpose(1, 2).flatten(2).float()
    # project each token once, not once per window; tokens beyond the ends are zero
    bias = weights["enc.mha.in_proj_bias"]
    projected = F.linear(tokens, weights["enc.mha.in_proj_weight"], bias)
    ends = [bias.expand(batch, many, -1) for many in (window - 1, window)]
    projected = torch.cat([ends[0], projected, ends[1]], dim=1)
    step = max(min(ELEMENTS // (2 * window * projected.shape[2]), MOST) // max(batch, 1), 1)
    pieces = [projected[:, first : min(first + step, length) + 2 * window - 1] for first in range(0, length, step)]
    return torch.cat([_logits(predictor, piece) for piece in pieces], dim=1)


def _logits(predictor: Predictor, projected: Tensor) -> Tensor:
    """[B, n + 2 window - 1, 3C] to [B, n]."""
    weights, window = predictor.tensors, predictor.window
    batch, channels = projected.shape[0], projected.shape[2] // 3
    windows = projected.unfold(1, 2 * window, 1).transpose(2, 3)  # [B, n, 2 window, 3C]
    query, key, value = (
        part.unflatten(3, (predictor.heads, -1)).flatten(0, 1).transpose(1, 2) for part in windows.split(channels, 3)
    )
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    mixed = F.linear(mixed, weights["enc.mha.out_proj.weight"], weights["enc.mha.out_proj.bias"])
    mixed = F.layer_norm(mixed, (channels,), weights["enc.norm.weight"], weights["enc.norm.bias"])
    left, right = (_pooled(predictor, half) for half in mixed.split(window, dim=1))
    alike = F.cosine_similarity(left, right, dim=-1, eps=COSINE_EPS)[:, None]
    features = torch.cat([left, right, (left - right).abs(), left * right, alike], dim=1)
    hidden = F.relu(F.linear(features, weights["mlp.0.weight"], weights["mlp.0.bias"]))
    return F.linear(hidden, weights["mlp.2.weight"], weights["mlp.2.bias"]).view(batch, -1)


def _pooled(predictor: Predictor, half: Tensor) -> Tensor:
    """One vector for the tokens on one side: [n, window, C] to [n, C]."""
    if POOL not in predictor.tensors:
        return half.mean(dim=1)
    return (F.linear(half, predictor.tensors[POOL]).softmax(dim=1) * half).sum(dim=1)


def suppress(score: Tensor, apart: int, most: int) -> Tensor:
    """Non-maximum suppression of scores [B, N], bool [B, N]. ``-inf`` is no candidate; ties go to the earlier one.

    The greedy rule takes the greatest candidate, drops all within ``apart`` of it, and repeats, ``most`` times: a loop
    that synchronises with the GPU. Here each round takes every candidate that is the greatest within ``apart``, which
    gives the same result. Candidates undecided after ``ROUNDS`` rounds are dropped. That takes a run of more than
    ``ROUNDS`` x ``apart`` falling or equal scores, since each round decides the head of every such run.
    """
    length = score.shape[1]
    most = min(most, length)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(length, 0, -1, device=score.device, dtype=torch.float32).expand_as(score)
    undecided = torch.zeros_like(rank).scatter(1, order, rank).masked_fill(score == -torch.inf, 0.0)
    taken = torch.zeros_like(undecided)
    for _ in range(ROUNDS):
        best = (undecided > 0) & (undecided == _greatest(undecided, apart))
        taken = torch.where(best, undecided, taken)
        undecided = undecided.masked_fill(_greatest(best.float(), apart) > 0, 0.0)
        if on_host(score) and not undecided.any():
            break
    least = taken.topk(most, dim=1).values[:, -1:]
    return (taken > 0) & (taken >= least)


def _greatest(values: Tensor, apart: int) -> Tensor:
    """The maximum within ``apart`` of each element: [B, N]."""
    return F.max_pool1d(values[:, None], 2 * apart + 1, stride=1, padding=apart)[:, 0]
