"""Which blocks of keys each block of queries visits under any predicate, and which of them need no test, in ATen.

Nothing is evaluated for pairs of tokens but tensors that hold a value for each; see
:mod:`effattn.lowering.iteration.block_rule`. Nothing synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.ir import bounds
from effattn.ir.attention import AttentionSpec
from effattn.ir.fold import fold
from effattn.lowering.iteration.block_rule import Table, block_rule
from effattn.lowering.iteration.intervals import BlockAlgebra, Chunks, element
from effattn.lowering.iteration.ranges import Range, Truth
from effattn.runtime.algebra import TorchAlgebra, bindings, evaluate
from effattn.runtime.selection.block_list import BlockList

POSITIONS = bounds.around(2**40)  # no length or scalar is larger
PAIRS = 2**24  # most elements of a tensor of pairs that are looked at together


class Wanted(NamedTuple):
    """A block map that is wanted."""

    attention: AttentionSpec  # its rule; its captures, scalars and numbers name those below
    sizes: tuple[int, int, int, int]  # (B, Hq, Nq, Nk)
    captures: Sequence[Tensor]
    scalars: Sequence[int]
    numbers: Sequence[float]
    block: int  # queries of a block; transposed, keys
    unit: int  # keys of a block; transposed, queries
    device: torch.device
    transposed: bool = False  # the list of every block of keys: the queries that see it

    @property
    def tile(self) -> tuple[int, int]:
        """Queries and keys of a pair of blocks."""
        return (self.unit, self.block) if self.transposed else (self.block, self.unit)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the list's ``kv_indices``; sizes may be symbolic."""
        batches, heads, *lengths = self.sizes
        rule = block_rule(self.attention.rule)
        rows, width = ((length + size - 1) // size for length, size in zip(lengths, self.tile, strict=True))
        sides = (width, rows) if self.transposed else (rows, width)
        return batches if rule.by_batch else 1, heads if rule.by_head else 1, *sides


def block_map(wanted: Wanted) -> BlockList:
    """The list of every block of queries, or of keys."""
    attention, sizes, device = wanted.attention, wanted.sizes, wanted.device
    names, tensors = bindings(attention, wanted.captures, wanted.scalars, wanted.numbers)
    some, every = block_grid(attention.rule, sizes, names, tensors, *wanted.tile, device)
    if wanted.transposed:
        some, every = some.mT, every.mT
    whole = sizes[2 if wanted.transposed else 3] // wanted.unit
    every = every & (torch.arange(some.shape[3], device=device) < whole)  # a block that ends early is tested
    partial = some & ~every
    rank = torch.where(partial, 0, torch.where(some, 1, 2))
    indices = rank.argsort(dim=-1, stable=True)
    return BlockList(
        indices.to(torch.int32).contiguous(),
        some.sum(dim=-1, dtype=torch.int32),
        partial.sum(dim=-1, dtype=torch.int32),
        wanted.block,
        wanted.unit,
    )


def block_grid(
    rule: Any,
    sizes: tuple[int, int, int, int],
    names: Mapping[str, Any],
    captures: Mapping[str, Tensor],
    block_m: int,
    block_n: int,
    device: Any,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(pairs of blocks in which some query may keep a key; those in which every query keeps every key).

    bool [B or 1, Hq or 1, blocks of queries, blocks of keys]; 1 where the rule does not depend on batch or head.
    ``dtype``: that in which the rule's floats are computed. Other arguments as in :class:`Wanted`.
    """
    parts = block_rule(rule)
    grid = _Grid(sizes, names, captures, block_m, block_n, device, dtype)
    tables = {table.name: grid.table(table) for table in parts.tables}
    captures = dict(captures)
    below = TorchAlgebra({**names, **grid.symbols(4)}, captures, dtype, device)

    def given(chunks: Chunks) -> bool:
        if chunks.names[0] not in captures:
            captures.update(zip(chunks.names, extremes(captures[chunks.name], chunks), strict=True))
        return True

    def load(name: str, indices: Sequence[Range]) -> Range:
        if name in tables:
            return tables[name]
        return element(algebra, name, indices, str(captures[name].dtype).removeprefix("torch."), given)

    algebra = BlockAlgebra(below, {"q": grid.range(0), "k": grid.range(1)}, load, POSITIONS)
    truth: Truth = fold(parts.rule, algebra)
    shape = (sizes[0] if parts.by_batch else 1, sizes[1] if parts.by_head else 1, *grid.counts)
    some, every = (torch.as_tensor(value, device=device).expand(shape) for value in (truth.some, truth.every))
    return some, every


def extremes(tensor: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each chunk, NaN if one of its elements is; of booleans as uint8.

    What is missing of the last chunk is 0, as kernels read it.
    """
    missing = -tensor.shape[chunks.dim] % chunks.size
    tensor = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    padded = F.pad(tensor, [0, 0] * (tensor.ndim - 1 - chunks.dim) + [0, missing])
    cut = padded.unflatten(chunks.dim, (-1, chunks.size))
    return cut.amin(chunks.dim + 1), cut.amax(chunks.dim + 1)


class _Grid:
    """The pairs of blocks of one call; tensors are [B or 1, Hq or 1, blocks of queries or 1, blocks of keys or 1]."""

    def __init__(self, sizes, names, captures, block_m: int, block_n: int, device, dtype):
        self.batch, self.heads, *self.lengths = sizes
        self.blocks = (block_m, block_n)
        self.counts = [-(-length // block) for length, block in zip(self.lengths, self.blocks, strict=True)]
        self.names, self.captures, self.device, self.dtype = names, captures, device, dtype

    def symbols(self, dims: int) -> dict[str, Any]:
        """The values that are the same for all tokens of a pair."""
        return {
            "Nq": self.lengths[0],
            "Nk": self.lengths[1],
            "b": torch.arange(self.batch, device=self.device).view(-1, *[1] * (dims - 1)),
            "h": torch.arange(self.heads, device=self.device).view(-1, *[1] * (dims - 2)),
        }

    def range(self, side: int) -> Range:
        """Positions of the queries (0) or keys (1) of a block."""
        block, length = self.blocks[side], self.lengths[side]
        first = self.on_side(torch.arange(self.counts[side], device=self.device) * block, side)
        last = (first + block - 1).clamp(max=length - 1)
        return Range(first, last, "int", bounds.Interval(0, length), span=block - 1, aligned=block)

    def on_side(self, values: Tensor, side: int) -> Tensor:
        return values[..., :, None] if side == 0 else values[..., None, :]

    def table(self, table: Table) -> Range:
        """The least and the greatest value of a table's term in each block."""
        if table.side == "qk":
            return self._of_pairs(table)
        side = "qk".index(table.side)
        value = self._value(table.term, 3, **{table.side: self._tokens(side, 0, self.counts[side])})
        shape = torch.broadcast_shapes(value.shape, (1, 1, self.counts[side] * self.blocks[side]))
        low, high = _extremes(value.expand(shape).unflatten(2, (-1, self.blocks[side])), (3,))
        return self._range(self.on_side(low, side), self.on_side(high, side), table)

    def _of_pairs(self, table: Table) -> Range:
        """The same of a tensor with a value for each query and key, some blocks of queries at a time."""
        block_m, block_n = self.blocks
        keys = self._tokens(1, 0, self.counts[1])
        step = max(PAIRS // max(self.batch * self.heads * block_m * keys.numel(), 1), 1)
        found = []
        for first in range(0, self.counts[0], step):
            rows = self._tokens(0, first, min(first + step, self.counts[0]))
            value = self._value(table.term, 4, q=rows[:, None], k=keys)
            tiles = value.unflatten(3, (-1, block_n)).unflatten(2, (-1, block_m))
            found.append(_extremes(tiles, (3, 5)))
        low, high = (torch.cat(ends, dim=2) for ends in zip(*found, strict=True))
        return self._range(low, high, table)

    def _tokens(self, side: int, first: int, last: int) -> Tensor:
        """Positions of the tokens of some blocks; what is missing of the last block is its last token."""
        block, length = self.blocks[side], self.lengths[side]
        return torch.arange(first * block, last * block, device=self.device).clamp(max=length - 1)

    def _value(self, term: Any, dims: int, **tokens: Tensor) -> Tensor:
        symbols = {**self.names, **self.symbols(dims), **tokens}
        value = torch.as_tensor(evaluate(term, symbols, self.captures, self.dtype, self.device), device=self.device)
        return value.view((1,) * (dims - value.ndim) + value.shape)

    def _range(self, low: Tensor, high: Tensor, table: Table) -> Range:
        if low.is_floating_point():
            return Range(low, high, "float")
        within = bounds.interval(table.term, lambda name: POSITIONS, self._bounds_of)
        return Range(low, high, "int", within if within.within(bounds.INT64) else bounds.INT64)

    def _bounds_of(self, name: str) -> bounds.Interval:
        return bounds.INTEGERS.get(str(self.captures[name].dtype).removeprefix("torch."), bounds.UNKNOWN)


def _extremes(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Minimum and maximum; NaN if one of the values is."""
    values = values.to(torch.int64) if values.dtype == torch.bool else values
    return values.amin(dim=dims), values.amax(dim=dims)
