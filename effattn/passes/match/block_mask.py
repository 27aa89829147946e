"""What a flex_attention call has besides its mods: block lists, and the code that makes them.

Lists made by ``create_block_mask`` inside the graph follow from mask_mod. Lists that are inputs may hide more keys, in
this or a later call, so they become part of the mask as data (:mod:`effattn.passes.canonicalize.block_lists`). If they
hide more than mask_mod when the graph is compiled (``BlockMask.from_kv_blocks``), the call is left alone:
FlexAttention's kernels skip blocks that are not listed, and the op would visit them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import b, h, k, q
from effattn.ir.refusal import Why
from effattn.passes.candidate.record import Refused
from effattn.passes.graph.sizes import equal, is_broadcast
from effattn.passes.graph.view import GraphView, as_sympy, hint
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic import Reader
from effattn.runtime.algebra import evaluate
from effattn.runtime.ops.block_lists import as_blocks

NO_BLOCKS = 1 << 30  # block size of a call without a block mask
SAMPLE = 1 << 22  # entries of the mask that are compared with the lists
TABLE = torch.ops.effattn.listed_blocks.default
MADE_BY = "in create_block_mask"  # in the stack trace of lists made inside the graph


_compared: WeakKeyDictionary[GraphView, set[tuple]] = WeakKeyDictionary()


@dataclass(frozen=True)
class BlockMask:
    """The operator's argument from ``BlockMask.as_tuple()``.

    For each row of blocks, [B, H, rows]: the number and the indices of blocks with allowed entries, and of full blocks
    (None if full blocks are not known).
    """

    counts: Any
    indices: Any
    full_counts: Any
    full_indices: Any
    q_block: Any
    kv_block: Any
    mask_mod: fx.Node

    @staticmethod
    def of(call: Call) -> BlockMask:
        """Raises Refused if the argument has an unknown layout."""
        parts = call.get("block_mask")
        if not isinstance(parts, tuple) or len(parts) < 13 or not isinstance(parts[-1], fx.Node):
            raise Refused(Why.BLOCK_MASK, "the block mask of the call has an unknown layout")
        return BlockMask(*parts[2:6], *parts[-3:])

    @property
    def has_lists(self) -> bool:
        return not (self.q_block == NO_BLOCKS and self.kv_block == NO_BLOCKS)

    @property
    def come_from_outside(self) -> bool:
        """Whether the lists are inputs of the graph."""
        return self.has_lists and isinstance(self.counts, fx.Node) and self.counts.op == "placeholder"

    @property
    def lists(self) -> tuple[Any, ...]:
        return (self.counts, self.indices, self.full_counts, self.full_indices)

    def restrict(self, view: GraphView, allowed: Any, reader: Reader, time: int) -> Any:
        """``allowed``, the predicate of mask_mod, restricted to the listed blocks.

        Raises:
            Refused: the lists hide more than mask_mod in the first call, or may do so and cannot be read as data.
        """
        if not self.has_lists:
            return allowed
        batch, heads = view.shape(self.counts)[:2]
        if self.come_from_outside:
            _compare_once(self, view, allowed, reader)
            return sympy.And(allowed, self._listed(view, reader, (batch, heads), time))
        for index, size, what in ((b, batch, "batch"), (h, heads, "head")):
            if is_broadcast(view, size, reader.sizes[index]) is not False and allowed.has(index):
                raise Refused(Why.BLOCK_MASK, f"mask_mod depends on the {what} index, and the block mask has only one")
        traces = [node.meta.get("stack_trace") or "" for node in (self.counts, self.indices)]
        if not all(MADE_BY in trace for trace in traces):
            raise Refused(
                Why.BLOCK_MASK,
                "its block lists are computed in the graph and may hide keys that mask_mod allows",
                "make it with create_block_mask",
            )
        return allowed

    def _listed(self, view: GraphView, reader: Reader, sizes: tuple, time: int) -> Any:
        """Whether the blocks of query and key are listed, read from the table that was inserted before matching."""
        tables = [node for node in self.counts.users if node.target is TABLE and node.args[:4] == self.lists]
        tables = [node for node in tables if node.args[5] == self.kv_block and view.time[node] < time]
        tables = [node for node in tables if equal(view, view.shape(node.args[4])[2], reader.sizes[k])]
        written = any(view.writes_between(made, view.time[node], time) for node in tables for made in self._nodes)
        if not tables or written:
            raise Refused(Why.BLOCK_MASK, "its block lists may hide keys that mask_mod allows")
        place: list[Any] = []
        for index, size in zip((b, h), sizes, strict=True):  # FlexAttention's kernels index modulo the size
            place.append(index if equal(view, size, reader.sizes[index]) else expr.Modulo(index, size))
        sides = ((q, self.q_block), (k, self.kv_block))
        place += [expr.FloorDiv(index, reader.extent(block)) for index, block in sides]
        return reader.as_data(tables[0], time).bool_at(tuple(place))

    @property
    def _nodes(self) -> list[fx.Node]:
        return [node for node in self.lists if isinstance(node, fx.Node)]


# -- lists that arrive as inputs ---------------------------------------------------------------------------------


def _compare_once(mask: BlockMask, view: GraphView, allowed: Any, reader: Reader) -> None:
    """Compare once for layers that share a block mask."""
    known = _compared.setdefault(view, set())
    key = (*mask.lists, allowed)
    if key not in known:
        _compare(mask, view, allowed, reader)
        known.add(key)


def _compare(mask: BlockMask, view: GraphView, allowed: Any, reader: Reader) -> None:
    """Compare the lists of the first call with mask_mod, on some rows of blocks, if their values are known."""
    names = ("counts", "indices", "full_counts", "full_indices", "q_block", "kv_block")
    counts, indices, full_counts, full_indices, q_block, kv_block = (_real(getattr(mask, name)) for name in names)
    sources = {load.name: reader.captures[load.name].node for load in expr.loads_of(allowed)}
    captures = {name: _real(node) for name, node in sources.items()}
    lists = [counts, indices] + ([] if mask.full_counts is None else [full_counts, full_indices])
    if any(not isinstance(tensor, torch.Tensor) for tensor in (*lists, *captures.values())):
        return
    q_len, k_len = (_hint(view, reader.sizes[index]) for index in (expr.q, expr.k))
    device = counts.device
    room = max(1, SAMPLE // (q_block * k_len))
    rows = _spread(counts.shape[2], room, device)
    batches = _spread(counts.shape[0], room // len(rows), device)
    heads = _spread(counts.shape[1], room // (len(rows) * len(batches)), device)
    columns = -(-k_len // kv_block)
    listed = as_blocks(counts, indices, columns)[batches][:, heads][:, :, rows]
    full = torch.zeros_like(listed)
    if mask.full_counts is not None:
        full = as_blocks(full_counts, full_indices, columns)[batches][:, heads][:, :, rows]
    q = (rows[:, None] * q_block + torch.arange(q_block, device=device)).flatten()
    symbols = {
        "b": batches.view(-1, 1, 1, 1),
        "h": heads.view(1, -1, 1, 1),
        "q": q.view(1, 1, -1, 1),
        "k": torch.arange(k_len, device=device),
    }
    symbols |= {symbol.name: _hint(view, symbol) for symbol in expr.free_symbols(allowed) - set(expr.INDICES)}
    seen = torch.as_tensor(evaluate(allowed, symbols, captures, torch.float64, device), device=device)
    seen = seen.expand(len(batches), len(heads), len(q), k_len) & (q < q_len)[:, None]
    blocks = (
        torch.nn.functional.pad(seen, (0, -k_len % kv_block))
        .unflatten(-1, (-1, kv_block))
        .unflatten(2, (len(rows), -1))
    )
    some = blocks.any(dim=-1).any(dim=3)
    outside = (q >= q_len)[:, None] | (torch.arange(blocks.shape[-2] * kv_block, device=device) >= k_len)
    beyond = outside.unflatten(-1, (-1, kv_block)).unflatten(0, (len(rows), -1))
    whole = (blocks | beyond).all(dim=-1).all(dim=3)
    if bool((some & ~(listed | full)).any()) or bool((full & ~whole).any()):
        raise Refused(
            Why.BLOCK_MASK,
            "its block lists do not follow its mask_mod: they were made by hand",
            "express the choice of blocks in mask_mod",
        )


def _spread(size: int, at_most: int, device: torch.device) -> torch.Tensor:
    """Some of the numbers below ``size``, including the last."""
    return torch.linspace(size - 1, 0, max(1, min(size, at_most)), device=device).long()


def _real(value: Any) -> Any:
    """The tensor or number in the graph's first call; None if it is unknown."""
    if not isinstance(value, fx.Node):
        return value
    try:
        held = value.meta["grapharg"].example
    except (KeyError, AttributeError, AssertionError):
        return None
    if isinstance(held, torch.SymInt):
        return hint(held)
    return held if isinstance(held, torch.Tensor) and getattr(held, "fake_mode", None) is None else None


def _hint(view: GraphView, term: Any) -> int:
    """The size while tracing."""
    values = {}
    for node in view.graph.nodes:
        for value in (view.value(node), *getattr(view.tensor(node), "shape", ())):
            if isinstance(value, torch.SymInt) and as_sympy(value).is_Symbol:
                values[as_sympy(value)] = hint(value)
        if node.op != "placeholder":
            break
    return int(sympy.sympify(term).subs(values))
