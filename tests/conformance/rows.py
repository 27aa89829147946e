"""The complaints, in our own words and code; every number is a public issue of that project."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from tests.conformance.row import Row, attend, positions, qkv, tensors

BLOCK = 16  # side of FlexAttention's blocks, so that small lengths have several


def blocks(mask, q, batch=None):
    return create_block_mask(mask, batch, None, q.shape[2], q.shape[2], device=q.device, BLOCK_SIZE=BLOCK)


# -- written attention that Inductor's patterns take for another, or do not find -------------------------------------


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1))


def key_permuted(heads):
    """The key is laid out as [B, H, D, N] by one permute, and no transpose follows."""

    def function(q, k, v):
        q, v = (heads_of(x, heads).transpose(1, 2) for x in (q, v))
        weights = (torch.matmul(q, heads_of(k, heads).permute(0, 2, 3, 1)) * 0.25).softmax(dim=-1)
        return torch.matmul(weights, v)

    return function


def flat(length, width=32):
    return lambda device: [tensors(device, *[(2, length, width)] * 3)]


def additive_causal(q):
    i, j = positions(q)
    return torch.zeros(q.shape[2], q.shape[2], device=q.device).masked_fill(j > i, -torch.inf)


def scale_multiplied(q, k, v):
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    return (torch.matmul(q, k.transpose(-2, -1)).mul(1 / 3) + additive_causal(q)).softmax(dim=-1).matmul(v)


def mask_comes_first(q, k, v, mask):
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    return F.dropout((mask + q @ k.permute(0, 1, 3, 2)).float().softmax(-1), 0.1, training=False).to(v.dtype) @ v


def given_mask(device):
    q, k, v = qkv(device)
    mask = torch.zeros(2, 1, 1, 2).masked_fill(torch.tensor([[[[False, True]]], [[[False, False]]]]), -1e9)
    return [(q, k, v, mask.to(device))]


def scale_of_its_own(q, k, v, mask):
    """The scale is no 1 / sqrt(D)."""
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    return (torch.matmul(q, k.transpose(-2, -1)).div(8**-0.5) + mask).softmax(dim=-1).matmul(v)


def mask_or_none(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def none_then_a_mask(device):
    q, k, v = qkv(device)
    seen = torch.ones(2, 1, 20, 20, dtype=torch.bool, device=device).tril()
    return [(q, k, v, None), (q, k, v, seen), (q, k, v, None)]


# -- FlexAttention ---------------------------------------------------------------------------------------------------


def offset_of_data(q, k, v, offset):
    i, j = positions(q)
    return attend(q, k, v, (j <= i + offset) | (j == i))


def flex_offset_of_data(flex, q, k, v, offset):
    return flex(q, k, v, block_mask=blocks(lambda b, h, i, j: (j <= i + offset) | (j == i), q))


def with_offsets(device):
    return [(*qkv(device, length=40), torch.tensor(offset, device=device)) for offset in (0, 3)]


def documents(q, k, v, ids):
    i, j = positions(q)
    return attend(q, k, v, (ids[:, None, :, None] == ids[:, None, None]) & (j <= i))


def flex_documents(flex, q, k, v, ids):
    return flex(q, k, v, block_mask=blocks(lambda b, h, i, j: (ids[b, i] == ids[b, j]) & (j <= i), q, q.shape[0]))


def packed(sizes):
    def calls(device):
        found = []
        for number, (batch, length) in enumerate(sizes):
            starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(number)) < 0.2
            found.append((*qkv(device, batch, length=length, seed=number), starts.long().cumsum(-1).to(device)))
        return found

    return calls


def distance(q, k, v):
    i, j = positions(q)
    return attend(q, k, v, j <= i, i - j)


def flex_distance(flex, q, k, v):
    mask = blocks(lambda b, h, i, j: j <= i, q)
    return flex(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j), block_mask=mask)


def window(q, k, v):
    i, j = positions(q)
    return attend(q, k, v, (j <= i) & (i - j < 9))


def flex_window(flex, q, k, v):
    return flex(q, k, v, block_mask=blocks(lambda b, h, i, j: (j <= i) & (i - j < 9), q))


def lengths(*sizes):
    return lambda device: [qkv(device, length=length, seed=length) for length in sizes]


def of_the_batch(q, k, v):
    i, j = positions(q)
    even = torch.arange(q.shape[0], device=q.device)[:, None, None, None] % 2 == 0
    return attend(q, k, v, (j <= i) & even | (j == i))


def flex_of_the_batch(flex, q, k, v):
    return flex(q, k, v, block_mask=blocks(lambda b, h, i, j: (j <= i) & (b % 2 == 0) | (j == i), q, q.shape[0]))


def batches(*sizes):
    return lambda device: [qkv(device, batch, length=length, seed=length) for batch, length in sizes]


def learned_bias(q, k, v, bias):
    i, j = positions(q)
    return attend(q, k, v, j <= i, bias[:, (i - j).clamp(0, 7)])


def flex_learned_bias(flex, q, k, v, bias):
    mask = blocks(lambda b, h, i, j: j <= i, q)
    return flex(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h, (i - j).clamp(0, 7)], block_mask=mask)


def with_bias(device):
    return [(*qkv(device), *tensors(device, (2, 8), seed=9))]


# -- other libraries -------------------------------------------------------------------------------------------------


def packed_by_positions(q, k, v, place):
    """Documents start where positions do, as in transformers: found from data, in the graph."""
    starts = (torch.diff(place, prepend=place[:, :1] - 1) != 1).cumsum(-1)
    i, j = positions(q)
    return attend(q, k, v, (starts[:, None, :, None] == starts[:, None, None]) & (j <= i))


def with_positions(device):
    place = torch.cat([torch.arange(7), torch.arange(11), torch.arange(2)])[None].expand(2, -1).contiguous()
    return [(*qkv(device), place.to(device))]


def neighbourhood(q, k, v, padding):
    """Windows of 3 x 3 on a grid of 5 columns, some places of it padding."""
    i, j = positions(q)
    near = ((i // 5 - j // 5).abs() <= 1) & ((i % 5 - j % 5).abs() <= 1)
    return attend(q, k, v, near & (padding[:, None, None] | (i == j)))


def flex_neighbourhood(flex, q, k, v, padding):
    def near(b, h, i, j):
        return ((i // 5 - j // 5).abs() <= 1) & ((i % 5 - j % 5).abs() <= 1) & (padding[b, j] | (i == j))

    return flex(q, k, v, block_mask=blocks(near, q, q.shape[0]))


def grids(*rows):
    def calls(device):
        sizes = [5 * count for count in rows]
        return [(*qkv(device, length=n, seed=n), torch.arange(n, device=device).expand(2, -1) % 7 != 3) for n in sizes]

    return calls


def decayed(q, k, v):
    """Linear attention with a decay for each head."""
    i, j = positions(q)
    rate = torch.tensor([0.1, 0.3], device=q.device)[:, None, None]
    return ((q @ k.mT) * torch.exp(-rate * (i - j).clamp(min=0)).tril()) @ v


ROWS = (
    Row("pytorch #195320", "a permuted key is taken for a transposed one: wrong", key_permuted(4), flat(4)),
    Row("pytorch #195282", "a permuted key of another length: a crash", key_permuted(4), flat(12)),
    Row("pytorch #195412", "mul(scale) instead of div(scale) is missed", scale_multiplied, lengths(20)),
    Row("pytorch #195782", "mask + scores instead of scores + mask is missed", mask_comes_first, given_mask),
    Row("pytorch #174049, #151098", "a scale of one's own is lost: wrong", scale_of_its_own, given_mask),
    Row(
        "pytorch #177712", "a mask that is None in some calls", mask_or_none, none_then_a_mask, graphs=2,
        calls_sdpa=True,
    ),
    Row(
        "pytorch #158212", "gradients of a mask that data shifts are wrong", offset_of_data, with_offsets,
        flex_offset_of_data, grad=True,
    ),
    Row(
        "pytorch #186775", "NaN with dynamic shapes and a mask of the batch", documents,
        packed([(2, 20), (3, 33), (2, 47)]), flex_documents, graphs=2,
    ),
    Row(
        "pytorch #153799", "NaN gradients at a length that is no multiple of the block", distance, lengths(33),
        flex_distance, grad=True,
    ),
    Row(
        "pytorch #141486", "compiled again for every length", window, lengths(20, 33, 47, 52, 64), flex_window,
        graphs=2,
    ),
    Row("pytorch #134756", "the mask needs memory for every pair", window, lengths(2048), flex_window, small=True),
    Row(
        "pytorch #136196, #134560", "masks that depend on the batch, with dynamic shapes", of_the_batch,
        batches((2, 20), (3, 33), (5, 40)), flex_of_the_batch, graphs=2,
    ),
    Row(
        "attention-gym #20, #172", "gradients of a bias that is learned", learned_bias, with_bias, flex_learned_bias,
        grad=True,
    ),
    Row("transformers #41803", "packed sequences break the graph", packed_by_positions, with_positions),
    Row(
        "NATTEN #203, #310", "neighbourhoods with padding, compiled for any size", neighbourhood, grids(4, 6, 9),
        flex_neighbourhood, graphs=2,
    ),
    Row("fla #52", "linear attention under torch.compile is wrong", decayed, lengths(40), grad=True),
    Row("fla #1147", "linear attention is tuned again for every length", decayed, lengths(20, 33, 47, 70), graphs=2),
    Row(
        "fla #779", "linear attention in CUDA graphs", decayed, lambda device: lengths(40)(device) * 3,
        mode="reduce-overhead", needs="a GPU",
    ),
    Row("diffusers #13545", "a mask with a ring of GPUs", window, lengths(20), needs="several GPUs"),
)  # fmt: skip
