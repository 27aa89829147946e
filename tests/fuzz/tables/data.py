"""The tensors that a case is called with, by name. The same seed gives the same values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.tables.layouts import Sizes
from tests.fuzz.tables.masks import LONGEST
from tests.fuzz.where import DEVICE

INF = float("inf")


class Draw:
    """Random tensors of one size. ``hidden``: whether data may hide every key of a row."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, seed: int, hidden: bool):
        self.z, self.dtype, self.hidden = sizes, dtype, hidden
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def coins(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < 0.7

    def padding(self) -> Tensor:
        """[B, Nk]; the first key is seen, unless rows may be hidden."""
        seen = self.coins(self.z.batch, self.z.keys)
        seen[:, 0] = True
        if self.hidden:
            seen[:, 0] = False
            seen[-1] = False
        return seen

    def pairs(self, *shape: int) -> Tensor:
        seen = self.coins(*shape)
        seen[..., 0] = True
        if self.hidden:
            seen[..., 0, :] = False
        return seen

    def hashes(self) -> Tensor:
        """[B, Nq]: few values, and two that differ in their upper 32 bits alone."""
        return self.whole(0, 2, self.z.batch, self.z.queries) + (self.whole(0, 3, self.z.batch, self.z.queries) << 32)

    def times(self) -> Tensor:
        """[B, Nq]: nanoseconds since 1970, seconds apart."""
        return 1_764_000_000_000_000_000 + self.whole(0, 2_000_000_000, self.z.batch, self.z.queries).cumsum(-1)

    def starts(self) -> Tensor:
        starts = self.coins(self.z.batch, self.z.queries).logical_not().long()
        starts[:, 0] = 1
        return starts


def _positions(draw: Draw) -> Tensor:
    """Positions in documents: counted from the last start."""
    starts = draw.starts()
    places = torch.arange(starts.shape[1]).expand_as(starts)
    return places - (places * starts).cummax(-1).values


def _places(draw: Draw) -> Tensor:
    """Positions of keys as transformers gives them with padding on the left."""
    left = draw.whole(0, 3, draw.z.batch, 1)
    return (torch.arange(draw.z.keys)[None] - left).clamp(min=0)


def _infinite_bias(draw: Draw) -> Tensor:
    bias = draw.normal(draw.z.batch, 1, 1, draw.z.keys)
    bias[..., 0, 1::3] = -INF
    if draw.hidden:
        bias[-1] = -INF
    return bias


DATA: dict[str, Callable[[Draw], Tensor]] = {
    "triangle": lambda draw: torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()[None, None],
    "float triangle": lambda draw: torch.ones(LONGEST, LONGEST).tril(),
    "byte triangle": lambda draw: torch.ones(LONGEST, LONGEST, dtype=torch.uint8).tril(),
    "places": _places,
    "past": lambda draw: draw.whole(0, 6)[()],
    "lengths": lambda draw: draw.whole(1, draw.z.keys + 1, draw.z.batch),
    "left": lambda draw: draw.whole(0, draw.z.keys, draw.z.batch) if draw.hidden else draw.whole(0, 1, draw.z.batch),
    "padding": Draw.padding,
    "numbers": lambda draw: draw.padding().long(),
    "int32 ids": lambda draw: draw.whole(0, 40, draw.z.batch, draw.z.keys).int(),
    "int8 ids": lambda draw: draw.whole(-128, 128, draw.z.batch, draw.z.queries).to(torch.int8),
    "hashes": Draw.hashes,
    "times": Draw.times,
    "row padding": lambda draw: draw.coins(draw.z.batch, draw.z.queries),
    "row values": lambda draw: draw.normal(draw.z.batch, draw.z.queries),
    "starts": Draw.starts,
    "positions": _positions,
    "pairs": lambda draw: draw.pairs(draw.z.batch, 1, draw.z.queries, draw.z.keys),
    "plane": lambda draw: draw.pairs(draw.z.queries, draw.z.keys),
    "all pairs": lambda draw: draw.pairs(draw.z.batch, draw.z.query_heads, draw.z.queries, draw.z.keys),
    "wide heads": lambda draw: draw.coins(draw.z.query_heads),
    "slopes": lambda draw: (2.0 ** -torch.arange(1, draw.z.query_heads + 1)).to(draw.dtype) * (1 + draw.whole(0, 2)),
    "relative": lambda draw: draw.normal(15, draw.z.query_heads),
    "bias": lambda draw: draw.normal(draw.z.query_heads, LONGEST, LONGEST),
    "key bias": lambda draw: draw.normal(draw.z.batch, draw.z.keys),
    "pair bias": lambda draw: draw.normal(draw.z.batch, 1, draw.z.queries, draw.z.keys),
    "infinite bias": _infinite_bias,
    "low pairs": lambda draw: torch.zeros(draw.z.batch, 1, draw.z.queries, draw.z.keys, dtype=draw.dtype).masked_fill(
        ~draw.pairs(draw.z.batch, 1, draw.z.queries, draw.z.keys), torch.finfo(draw.dtype).min
    ),
    "temperature": lambda draw: (0.2 + 0.1 * draw.whole(0, 5)[()]).to(draw.dtype),
    "temperatures": lambda draw: draw.normal(draw.z.query_heads, 1, 1) * 0.3,
    "sink": lambda draw: draw.normal(draw.z.query_heads),
    "latent": lambda draw: draw.normal(draw.z.query_heads, 4, draw.z.width),
}
BATCHED = {
    "places", "lengths", "left", "padding", "numbers", "int32 ids", "int8 ids", "hashes", "times", "row padding",
    "row values", "starts", "positions", "pairs", "all pairs", "key bias", "pair bias", "infinite bias", "low pairs",
    "ids",
}  # fmt: skip
# which dimensions are lengths
LENGTHS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("int32 ids", "int8 ids", "hashes", "times"), (1,)),
    **dict.fromkeys(("places", "padding", "numbers", "row padding", "row values"), (1,)),
    **dict.fromkeys(("starts", "positions", "key bias"), (1,)),
    **dict.fromkeys(("pairs", "all pairs", "pair bias", "low pairs"), (2, 3)),
    "plane": (0, 1),
    "infinite bias": (3,),
    "ids": (1,),
}  # fmt: skip


def tensors(names: list[str], sizes: Sizes, dtype: torch.dtype, seed: int, hidden: bool) -> dict[str, Tensor]:
    """Tensors by name. ``ids`` are the documents that ``starts`` or ``positions`` cut, if one of them is asked for."""
    draw = Draw(sizes, dtype, seed, hidden)
    found = {name: DATA[name](draw) for name in names if name != "ids"}
    if "ids" in names:
        if "positions" in found:
            starts = (found["positions"] == 0).long()
            starts[:, 0] = 1
        else:
            starts = found.get("starts", draw.starts())
        found["ids"] = starts.cumsum(-1)
    return {name: found[name].to(DEVICE) for name in names}
