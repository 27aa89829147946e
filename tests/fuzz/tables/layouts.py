"""Where query, key and value come from: the layouts in which models hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int  # of key and value
    groups: int  # query heads of each
    queries: int
    keys: int
    width: int
    value_width: int

    @property
    def query_heads(self) -> int:
        return self.heads * self.groups


@dataclass(frozen=True)
class Layout:
    """``shapes(sizes)`` -> name: shape of the tensors that are given; ``open(given, sizes)`` -> q, k, v [B, H, N, D].

    ``lengths``: which dimension of each given tensor is a length, for dynamic shapes.
    """

    shapes: Callable
    open: Callable
    lengths: dict[str, int]
    packed: bool = False  # one tensor: as many keys as queries, all of one width
    grouped: bool = True  # may have fewer key heads
    one_head: bool = False
    batch: int = 0  # which dimension is the batch, or the batch and heads


def _three(query, key, value):
    """Shapes of three tensors from functions of (B, H, N, D)."""

    def shapes(z: Sizes):
        return {
            "q": query(z.batch, z.query_heads, z.queries, z.width),
            "k": key(z.batch, z.heads, z.keys, z.width),
            "v": value(z.batch, z.heads, z.keys, z.value_width),
        }

    return shapes


def _each(change: Callable):
    return lambda given, z: tuple(change(given[name]) for name in "qkv")


def _bhnd(b, h, n, d):
    return b, h, n, d


def _bnhd(b, h, n, d):
    return b, n, h, d


def _merged(b, h, n, d):
    return b, n, h * d


def _open_merged(given, z: Sizes):
    q, k, v = (given[name] for name in "qkv")
    q = q.view(q.shape[0], q.shape[1], z.query_heads, z.width).transpose(1, 2)
    k = k.view(k.shape[0], k.shape[1], -1, z.width).transpose(1, 2)
    return q, k, v.view(v.shape[0], -1, z.heads, z.value_width).permute(0, 2, 1, 3)


def _open_copied(given, z: Sizes):
    q, k, v = _open_merged(given, z)
    return q.contiguous(), k.contiguous(), v.contiguous()


def _unflattened(given, z: Sizes):
    return tuple(
        given[name].unflatten(-1, (heads, -1)).transpose(-3, -2)
        for name, heads in (("q", z.query_heads), ("k", z.heads), ("v", z.heads))
    )


def _flat(b, h, n, d):
    return n, b * h, d


def _open_flat(given, z: Sizes):
    """fairseq: sequence first, batch and heads in one dimension."""
    heads = {"q": z.query_heads, "k": z.heads, "v": z.heads}
    return tuple(given[n].transpose(0, 1).unflatten(0, (given[n].shape[1] // heads[n], heads[n])) for n in "qkv")


def _packed(*, of: Callable, shape: Callable, length: int = 1, grouped: bool = False):
    return Layout(lambda z: {"qkv": shape(z)}, of, {"qkv": length}, packed=True, grouped=grouped)


def _split(given, z: Sizes):
    x = given["qkv"]
    q, k, v = x.split([z.query_heads * z.width, z.heads * z.width, z.heads * z.width], dim=-1)
    return tuple(part.view(part.shape[0], part.shape[1], -1, z.width).transpose(1, 2) for part in (q, k, v))


def _chunk(given, z: Sizes):
    parts = given["qkv"].chunk(3, dim=-1)
    return tuple(part.reshape(part.shape[0], part.shape[1], z.heads, z.width).permute(0, 2, 1, 3) for part in parts)


def _unbind(given, z: Sizes):
    x = given["qkv"]
    return x.reshape(x.shape[0], x.shape[1], 3, z.heads, z.width).permute(2, 0, 3, 1, 4).unbind(0)


def _indexed(given, z: Sizes):
    x = given["qkv"]
    x = x.view(x.shape[0], x.shape[1], z.heads, 3, z.width)
    return tuple(x[..., part, :].transpose(1, 2) for part in range(3))


def _of_heads(given, z: Sizes):
    """Falcon: the query heads of a group, then its key, then its value."""
    x = given["qkv"]
    x = x.view(x.shape[0], x.shape[1], z.heads, z.groups + 2, z.width)
    q = x[:, :, :, :-2].flatten(2, 3)
    return tuple(part.transpose(1, 2) for part in (q, x[:, :, :, -2], x[:, :, :, -1]))


def _projected(given, z: Sizes):
    x = given["hidden"]
    heads = {"q": z.query_heads, "k": z.heads, "v": z.heads}
    return tuple(F.linear(x, given[f"w{n}"]).view(*x.shape[:-1], heads[n], z.width).transpose(1, 2) for n in "qkv")


def _projection(z: Sizes):
    inner = 12
    weights = {n: (heads * z.width, inner) for n, heads in (("wq", z.query_heads), ("wk", z.heads), ("wv", z.heads))}
    return {"hidden": (z.batch, z.queries, inner), **weights}


def _rows_of_three(z: Sizes):
    return z.batch, z.queries, 3 * z.heads * z.width


LAYOUTS: dict[str, Layout] = {
    "[B, H, N, D]": Layout(_three(_bhnd, _bhnd, _bhnd), _each(lambda x: x), {"q": 2, "k": 2, "v": 2}),
    "[B, N, H, D]": Layout(
        _three(_bnhd, _bnhd, _bnhd), _each(lambda x: x.transpose(1, 2)), {"q": 1, "k": 1, "v": 1}
    ),
    "[N, B, H, D]": Layout(
        _three(*[lambda b, h, n, d: (n, b, h, d)] * 3), _each(lambda x: x.permute(1, 2, 0, 3)),
        {"q": 0, "k": 0, "v": 0}, batch=1,
    ),
    "[B, N, HD]": Layout(_three(_merged, _merged, _merged), _open_merged, {"q": 1, "k": 1, "v": 1}),
    "[B, N, HD], copied": Layout(_three(_merged, _merged, _merged), _open_copied, {"q": 1, "k": 1, "v": 1}),
    "[B, N, HD], unflattened": Layout(_three(_merged, _merged, _merged), _unflattened, {"q": 1, "k": 1, "v": 1}),
    "[N, BH, D]": Layout(_three(_flat, _flat, _flat), _open_flat, {"q": 0, "k": 0, "v": 0}, batch=1),
    "key [B, H, D, N]": Layout(
        _three(_bhnd, lambda b, h, n, d: (b, h, d, n), _bhnd),
        lambda given, z: (given["q"], given["k"].transpose(2, 3), given["v"]), {"q": 2, "k": 3, "v": 2},
    ),
    "mixed": Layout(
        _three(_bhnd, _bnhd, _merged),
        lambda given, z: (
            given["q"], given["k"].swapaxes(1, 2),
            given["v"].view(given["v"].shape[0], -1, z.heads, z.value_width).movedim(2, 1),
        ), {"q": 2, "k": 1, "v": 1},
    ),
    "one head": Layout(
        _three(*[lambda b, h, n, d: (b, n, d)] * 3), _each(lambda x: x[:, None]), {"q": 1, "k": 1, "v": 1},
        one_head=True,
    ),
    "packed, split": _packed(
        of=_split, shape=lambda z: (z.batch, z.queries, (z.query_heads + 2 * z.heads) * z.width), grouped=True
    ),
    "packed, chunk": _packed(of=_chunk, shape=_rows_of_three),
    "packed, unbind": _packed(of=_unbind, shape=_rows_of_three),
    "packed, index": _packed(of=_indexed, shape=_rows_of_three),
    "packed, groups": _packed(
        of=_of_heads, shape=lambda z: (z.batch, z.queries, (z.groups + 2) * z.heads * z.width), grouped=True
    ),
    "projected": Layout(_projection, _projected, {"hidden": 1}, packed=True),
}  # fmt: skip
