"""How people write the rest of attention: scale, product, score, softmax, dropout, output, and the heads of a group.

Every function is traced. Tensors are [B, H, N, D] and [B, H, Nq, Nk] where nothing else is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

INF = float("inf")


def same(x, *rest):
    return x


# -- the product of query and key -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """``make(q, k, given)`` -> scores. ``leads``: also for [B, G, H, N, D], as grouped heads have it."""

    make: Callable
    leads: bool = False
    data: tuple[str, ...] = ()


def _bmm(q, k, given):
    return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, q.shape[:2])


def _bmm_of_views(q, k, given):
    batch, heads, rows, width = q.shape
    q = q.reshape(batch * heads, rows, width)
    k = k.reshape(batch * heads, -1, width)
    return torch.bmm(q, k.transpose(1, 2)).view(batch, heads, rows, -1)


def _baddbmm(beta: float, alpha: float):
    def make(q, k, given):
        batch, heads, rows, keys = *q.shape[:3], k.shape[2]
        nothing = torch.empty(batch * heads, rows, keys, dtype=q.dtype, device=q.device)
        if beta:
            nothing = torch.zeros_like(nothing)
        flat = torch.baddbmm(nothing, q.flatten(0, 1), k.flatten(0, 1).mT, beta=beta, alpha=alpha)
        return flat.view(batch, heads, rows, keys)

    return make


def _bloom(q, k, given):
    """ALiBi [B * H, 1, Nk] goes into the product."""
    batch, heads, rows, _ = q.shape
    slopes = given["slopes"].to(q.dtype)
    alibi = (slopes[None, :, None] * torch.arange(k.shape[2], dtype=q.dtype, device=q.device)).expand(batch, -1, -1)
    alibi = alibi.reshape(batch * heads, 1, -1)
    flat = alibi.baddbmm(q.flatten(0, 1), k.flatten(0, 1).transpose(-1, -2), beta=1.0, alpha=0.5)
    return flat.view(batch, heads, rows, -1)


PRODUCTS: dict[str, Product] = {
    "@": Product(lambda q, k, given: q @ k.mT, leads=True),
    "matmul": Product(lambda q, k, given: torch.matmul(q, k.transpose(-1, -2)), leads=True),
    "method": Product(lambda q, k, given: q.matmul(k.transpose(-2, -1).contiguous()), leads=True),
    "keys first": Product(lambda q, k, given: (k @ q.mT).transpose(-2, -1), leads=True),
    "permuted": Product(lambda q, k, given: q @ k.permute(0, 1, 3, 2)),
    "bmm": Product(_bmm),
    "bmm of views": Product(_bmm_of_views),
    "baddbmm": Product(_baddbmm(0.0, 1.0)),
    "baddbmm, scaled": Product(_baddbmm(0, 0.3)),
    "baddbmm, zeros": Product(_baddbmm(1, 0.5)),
    "baddbmm, alibi": Product(_bloom, data=("slopes",)),
    "einsum": Product(lambda q, k, given: torch.einsum("bhid,bhjd->bhij", q, k)),
    "einsum, dots": Product(lambda q, k, given: torch.einsum("...id,...jd->...ij", q, k), leads=True),
    "einsum, dots, swapped": Product(lambda q, k, given: torch.einsum("...jd,...id->...ij", k, q), leads=True),
    "einsum, rows first": Product(
        lambda q, k, given: torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))
    ),
    "einsum, keys before rows": Product(
        lambda q, k, given: torch.einsum("bhqd, bhkd -> bhkq", q, k).transpose(2, 3)
    ),
    "einsum, heads last": Product(lambda q, k, given: torch.einsum("bhqd,bhkd->bqkh", q, k).permute(0, 3, 1, 2)),
    "einsum, capitals": Product(lambda q, k, given: torch.einsum("BHTD,BHSD->BHTS", q, k)),
    "einsum, heads first": Product(lambda q, k, given: torch.einsum("bhid,bhjd->hbij", q, k).transpose(0, 1)),
}  # fmt: skip


# -- scale ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """``before(q, k, given)`` -> (q, k) and ``after(scores, given)``."""

    before: Callable = lambda q, k, given: (q, k)
    after: Callable = same
    data: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()


def _root(x):
    return x.shape[-1] ** -0.5


def _quarter(q, k, given):
    scale = 1 / math.sqrt(math.sqrt(q.shape[-1]))
    return q * scale, k * scale


SCALES: dict[str, Scale] = {
    "none": Scale(),
    "times a number": Scale(after=lambda s, given: s * 0.3),
    "number first": Scale(after=lambda s, given: 0.3 * s),
    "divided": Scale(after=lambda s, given: s / math.sqrt(8)),
    "divided by an integer": Scale(after=lambda s, given: s / 3),
    "in place": Scale(after=lambda s, given: s.mul_(0.4)),
    "divided in place": Scale(after=lambda s, given: s.div_(2.5)),
    "of the query": Scale(lambda q, k, given: (q * _root(q), k)),
    "of the query, divided": Scale(lambda q, k, given: (q / q.shape[-1] ** 0.5, k)),
    "of the key": Scale(lambda q, k, given: (q, k * _root(k))),
    "of both": Scale(_quarter),
    "of all three": Scale(lambda q, k, given: (q * 2.0, k / 4), lambda s, given: s * 0.7),
    "negative": Scale(lambda q, k, given: (-q, k), lambda s, given: s * -0.5),
    "root in a tensor": Scale(after=lambda s, given: s / torch.sqrt(torch.tensor(8.0))),
    "full in a tensor": Scale(after=lambda s, given: s / torch.full([], 8**0.5, dtype=s.dtype)),
    "tensor of the query": Scale(lambda q, k, given: (q * torch.tensor(8**-0.5, dtype=q.dtype), k)),
    "0-d tensor": Scale(after=lambda s, given: s * given["temperature"], data=("temperature",)),
    "0-d tensor of the query": Scale(
        lambda q, k, given: (q * given["temperature"], k), data=("temperature",), learned=("temperature",)
    ),
    "learned": Scale(
        after=lambda s, given: s * given["temperature"].exp(), data=("temperature",), learned=("temperature",)
    ),
    "of heads": Scale(
        after=lambda s, given: s * given["temperatures"].clamp(max=0.9).exp(),
        data=("temperatures",), learned=("temperatures",),
    ),
}  # fmt: skip
NORMS: dict[str, Callable] = {
    "none": lambda q, k: (q, k),
    "length": lambda q, k: (F.normalize(q, dim=-1) * 4, F.normalize(k, dim=-1)),
    "rms": lambda q, k: (F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])),
    "layer": lambda q, k: (F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])),
    "by hand": lambda q, k: tuple(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) for x in (q, k)),
}


# -- score ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """``put(scores, i, j, given)`` -> scores. ``learned``: data that has a gradient where one is asked for."""

    put: Callable
    data: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()


def _slopes(given):
    return given["slopes"].view(1, -1, 1, 1)


def _relative(s, i, j, given):
    place = (i - j).clamp(-7, 7) + 7
    return s + given["relative"][place].permute(2, 0, 1).to(s.dtype)


def _relative_of_heads(s, i, j, given):
    place = (j - i).clamp(min=-7, max=7) + 7
    return s + given["relative"].t()[:, place].to(s.dtype)


def _embedded(s, i, j, given):
    return s + F.embedding((i - j).abs().clamp(max=14), given["relative"]).permute(2, 0, 1)[None].to(s.dtype)


def _bias(s, i, j, given):
    return s + given["bias"][None, :, : i.shape[0], : j.shape[1]]


SCORES: dict[str, Score] = {
    "plain": Score(same),
    "soft cap": Score(lambda s, i, j, given: 3.0 * torch.tanh(s / 3.0)),
    "soft cap by steps": Score(lambda s, i, j, given: torch.tanh(s / 5) * 5),
    "alibi": Score(lambda s, i, j, given: s - _slopes(given) * (i - j).abs(), ("slopes",)),
    "alibi of keys": Score(lambda s, i, j, given: s + _slopes(given) * j, ("slopes",)),
    "alibi to the past": Score(lambda s, i, j, given: s + (_slopes(given) * (j - i)).to(s.dtype), ("slopes",)),
    "alibi of numbers": Score(
        lambda s, i, j, given: s + torch.tensor([[[0.5]]], dtype=s.dtype, device=s.device) * (j - i).clamp(max=0)
    ),
    "relative table": Score(_relative, ("relative",), ("relative",)),
    "relative table of heads": Score(_relative_of_heads, ("relative",), ("relative",)),
    "relative embedding": Score(_embedded, ("relative",), ("relative",)),
    "bias": Score(_bias, ("bias",), ("bias",)),
    "bias of keys": Score(lambda s, i, j, given: s + given["key bias"][:, None, None], ("key bias",), ("key bias",)),
    "table of key positions": Score(
        lambda s, i, j, given: s + given["relative"][given["places"].clamp(max=14)].permute(0, 2, 1)[:, :, None],
        ("relative", "places"), ("relative",),
    ),
    "of rows": Score(lambda s, i, j, given: s * given["row values"].abs()[:, None, :, None], ("row values",)),
    "of rows, added": Score(lambda s, i, j, given: s + given["row values"][:, None, :, None], ("row values",)),
    "bias of pairs": Score(lambda s, i, j, given: s + given["pair bias"], ("pair bias",)),
    "shifted": Score(lambda s, i, j, given: s + 1.5),
    "subtracted": Score(lambda s, i, j, given: 2 - s),
    "clamped": Score(lambda s, i, j, given: s.clamp(-2, 2)),
    "distance": Score(lambda s, i, j, given: s - 0.1 * torch.maximum(i, j)),
    "alternating": Score(lambda s, i, j, given: torch.where((i + j) % 2 == 0, s, s * 0.5)),
    "near": Score(lambda s, i, j, given: torch.where((i - j).abs() < 3, s + 1.0, s)),
    "logarithmic": Score(lambda s, i, j, given: s * (i + 2.0).log(), ()),
    "twice": Score(lambda s, i, j, given: s + s * 0.5),
    "divided by much": Score(lambda s, i, j, given: s / 3e8),
    "multiplied by little": Score(lambda s, i, j, given: s * 1e-4 + 0.5),
    "exponential": Score(lambda s, i, j, given: torch.exp(s.clamp(max=2))),
    "absolute": Score(lambda s, i, j, given: s.abs()),
    "at least": Score(lambda s, i, j, given: torch.maximum(s, -0.1 * (i - j).abs().to(s.dtype))),
    "divided by distance": Score(lambda s, i, j, given: s / (1e5 * (1 + (i - j).abs()))),
}  # fmt: skip
# what may make a fill that stands in the scores before it a number like others
CHANGES_FILLS = (
    "soft cap", "clamped", "subtracted", "alternating", "divided by much", "multiplied by little", "exponential",
    "absolute", "at least", "divided by distance",
)  # fmt: skip


# -- softmax --------------------------------------------------------------------------------------------------------


def _by_hand(s):
    e = torch.exp(s)
    return e / e.sum(dim=-1, keepdim=True)


def _by_hand_shifted(s):
    e = (s - s.amax(dim=-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def _by_hand_max(s):
    largest, _ = torch.max(s, dim=-1, keepdim=True)
    e = torch.exp(s - largest)
    return e / torch.sum(e, dim=-1, keepdim=True)


def _in_float32(s):
    return F.softmax(s.float(), dim=-1).to(s.dtype)


SOFTMAXES: dict[str, Callable] = {
    "function": lambda s: F.softmax(s, dim=-1),
    "torch": lambda s: torch.softmax(s, -1),
    "method": lambda s: s.softmax(dim=s.dim() - 1),
    "float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32),
    "through float32": _in_float32,
    "float32 of torch": lambda s: torch.softmax(s, dim=-1, dtype=torch.float32).type_as(s),
    "float64": lambda s: torch.softmax(s, dim=-1, dtype=torch.float64),
    "shifted": lambda s: F.softmax(s - s.max(dim=-1, keepdim=True).values, dim=-1),
    "module": torch.nn.Softmax(dim=-1),
    "special": lambda s: torch.special.softmax(s, -1),
    "by hand": _by_hand,
    "by hand, shifted": _by_hand_shifted,
    "by hand, max": _by_hand_max,
}
SCORES_ARE: dict[str, Callable] = {"as they are": same, "float32": lambda s: s.float()}
SINKS: dict[str, bool] = {"none": False, "column": True}
DROPOUTS: dict[str, Callable] = {
    "none": same,
    "p=0": lambda w: F.dropout(w, 0.0),
    "not training": lambda w: F.dropout(w, p=0.3, training=False),
    "module": torch.nn.Dropout(0.2).eval(),
    "contiguous": lambda w: w.contiguous(),
}


# -- output ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """``make(weights, v)`` -> result, in any layout. ``leads``: also with one more dimension of heads."""

    make: Callable
    leads: bool = False


def _merged(w, v):
    return (w @ v).transpose(1, 2).reshape(w.shape[0], w.shape[2], -1)


def _merged_view(w, v):
    out = torch.matmul(w, v).permute(0, 2, 1, 3).contiguous()
    return out.view(*out.shape[:-2], out.shape[-2] * out.shape[-1])


def _bmm_output(w, v):
    return torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).view(*w.shape[:3], v.shape[-1])


def _baddbmm_output(w, v):
    nothing = torch.empty(1, 1, 1, dtype=v.dtype, device=v.device)
    return torch.baddbmm(nothing, w.flatten(0, 1), v.flatten(0, 1), beta=0).unflatten(0, w.shape[:2])


OUTPUTS: dict[str, Output] = {
    "@": Output(lambda w, v: w @ v, leads=True),
    "matmul": Output(lambda w, v: torch.matmul(w, v), leads=True),
    "merged": Output(_merged),
    "merged view": Output(_merged_view),
    "bmm": Output(_bmm_output),
    "baddbmm": Output(_baddbmm_output),
    "einsum": Output(lambda w, v: torch.einsum("bhij,bhjd->bhid", w, v)),
    "einsum, dots": Output(lambda w, v: torch.einsum("...ij,...jd->...id", w, v), leads=True),
    "einsum, value first": Output(lambda w, v: torch.einsum("bhjd,bhij->bhid", v, w)),
    "einsum, rows first": Output(lambda w, v: torch.einsum("bhij,bhjd->bihd", w, v).flatten(2)),
    "einsum, heads first": Output(lambda w, v: torch.einsum("bhij,bhjd->hbid", w, v)),
    "transposed": Output(lambda w, v: (v.mT @ w.mT).mT, leads=True),
    "width before rows": Output(lambda w, v: v.transpose(-1, -2) @ w.transpose(-1, -2), leads=True),
    "rows first": Output(lambda w, v: (w @ v).permute(2, 0, 1, 3)),
}


# -- heads of a group -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """How key heads meet query heads. ``expand(x, groups)``; None: they are not expanded, but

    ``kind`` "five dimensions": query heads are split in [groups of a head] for both products, or
    "rows": all query heads of the one key head are rows, or "broadcast": one key head meets all by broadcasting.
    """

    expand: Callable | None = None
    kind: str = ""


def _expanded(x, n):
    batch, heads, rows, width = x.shape
    return x[:, :, None].expand(batch, heads, n, rows, width).reshape(batch, heads * n, rows, width)


GROUPS: dict[str, Group] = {
    "expand": Group(_expanded),
    "expand and flatten": Group(lambda x, n: x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2)),
    "repeat_interleave": Group(lambda x, n: x.repeat_interleave(n, dim=1)),
    "torch.repeat_interleave": Group(lambda x, n: torch.repeat_interleave(x, repeats=n, dim=-3)),
    "repeat": Group(lambda x, n: x.repeat(1, n, 1, 1)),
    "stacked": Group(lambda x, n: torch.stack([x] * n, dim=2).flatten(1, 2)),
    "indexed": Group(lambda x, n: x[:, torch.arange(x.shape[1] * n, device=x.device) // n]),
    "five dimensions": Group(kind="five dimensions"),
    "rows": Group(kind="rows"),
    "broadcast": Group(kind="broadcast"),
}
