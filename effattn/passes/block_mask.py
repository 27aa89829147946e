"""What a flex_attention call carries besides its mods: lists of blocks, and the code that makes them.

The lists are derived from mask_mod by ``create_block_mask``, and then say nothing that mask_mod does not say. But they
can also be made by hand and hide more (``BlockMask.from_kv_blocks``): such a mask is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import b, h
from effattn.ir.refusal import Why
from effattn.passes.draft import Refused
from effattn.passes.graph import GraphView, as_sympy, hint
from effattn.passes.reading import Reader
from effattn.passes.vocabulary import Call
from effattn.runtime.algebra import evaluate

NO_BLOCKS = 1 << 30  # the block size of a call without a mask
SAMPLE = 1 << 22  # entries of the mask that are compared with the lists
MADE_BY = "in create_block_mask"  # in the stack trace of lists that are made inside the graph


_compared: WeakKeyDictionary[GraphView, dict[tuple, int]] = WeakKeyDictionary()


@dataclass(frozen=True)
class BlockMask:
    """The tuple that ``BlockMask.as_tuple()`` gives to the operator.

    For each row of blocks [B, H, rows]: how many blocks hold some allowed entry, which ones, and which are allowed
    throughout (None: none is known to be).
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
        """Raises: Refused: the call carries something else."""
        parts = call.get("block_mask")
        if not isinstance(parts, tuple) or len(parts) < 13 or not isinstance(parts[-1], fx.Node):
            raise Refused(Why.BLOCK_MASK, "the block mask of the call has an unknown layout")
        return BlockMask(*parts[2:6], *parts[-3:])

    def notes(self, view: GraphView, allowed: Any, reader: Reader) -> list[str]:
        """Why the lists say no more than ``allowed``, which is what mask_mod says; [] where there are no lists.

        Raises:
            Refused: they do, or may.
        """
        if self.q_block == NO_BLOCKS and self.kv_block == NO_BLOCKS:
            return []
        batch, heads = view.shape(self.counts)[:2]
        for index, size, what in ((b, batch, "batch"), (h, heads, "head")):
            if size == 1 and allowed.has(index) and reader.sizes[index] != 1:
                raise Refused(Why.BLOCK_MASK, f"mask_mod depends on the {what} index, and the block mask has only one")
        if self.counts.op != "placeholder":
            traces = [node.meta.get("stack_trace") or "" for node in (self.counts, self.indices)]
            if not all(MADE_BY in trace for trace in traces):
                raise Refused(
                    Why.BLOCK_MASK,
                    "its lists of blocks are computed in the graph and may hide keys that mask_mod allows",
                    "make it with create_block_mask",
                )
            return []
        known = _compared.setdefault(view, {})  # layers share their block mask
        key = (self.counts, self.indices, self.full_counts, self.full_indices, allowed)
        if key not in known:
            known[key] = _compare(self, view, allowed, reader)
        compared = known[key]
        return [f"block lists taken to follow mask_mod, as they do in {compared:,} entries compared"]


# -- lists that arrive as inputs ---------------------------------------------------------------------------------


def _compare(mask: BlockMask, view: GraphView, allowed: Any, reader: Reader) -> int:
    """Hold the lists of the first call against mask_mod, on some rows of blocks; the number of entries compared."""
    names = ("counts", "indices", "full_counts", "full_indices", "q_block", "kv_block")
    counts, indices, full_counts, full_indices, q_block, kv_block = (_real(getattr(mask, name)) for name in names)
    sources = {load.name: reader.loads[load.name].node for load in expr.loads_of(allowed)}
    loads = {name: _real(node) for name, node in sources.items()}
    lists = [counts, indices] + ([] if mask.full_counts is None else [full_counts, full_indices])
    if any(not isinstance(tensor, torch.Tensor) for tensor in (*lists, *loads.values())):
        raise Refused(
            Why.BLOCK_MASK, "its lists of blocks cannot be compared with mask_mod", "make it inside the graph"
        )
    q_len, k_len = (_hint(view, reader.sizes[index]) for index in (expr.q, expr.k))
    device = counts.device
    room = max(1, SAMPLE // (q_block * k_len))
    rows = _spread(counts.shape[2], room, device)
    batches = _spread(counts.shape[0], room // len(rows), device)
    heads = _spread(counts.shape[1], room // (len(rows) * len(batches)), device)
    listed = _as_blocks(counts, indices)[batches][:, heads][:, :, rows]
    full = torch.zeros_like(listed)
    if mask.full_counts is not None:
        full = _as_blocks(full_counts, full_indices)[batches][:, heads][:, :, rows]
    q = (rows[:, None] * q_block + torch.arange(q_block, device=device)).flatten()
    symbols = {
        "b": batches.view(-1, 1, 1, 1),
        "h": heads.view(1, -1, 1, 1),
        "q": q.view(1, 1, -1, 1),
        "k": torch.arange(k_len, device=device),
    }
    symbols |= {symbol.name: _hint(view, symbol) for symbol in expr.free_symbols(allowed) - set(expr.INDICES)}
    seen = torch.as_tensor(evaluate(allowed, symbols, loads, torch.float64, device), device=device)
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
            "its lists of blocks do not follow its mask_mod: they were made by hand",
            "express the choice of blocks in mask_mod",
        )
    return seen.numel()


def _spread(size: int, at_most: int, device: torch.device) -> torch.Tensor:
    """Some of the numbers below ``size``, the last one among them."""
    return torch.linspace(size - 1, 0, max(1, min(size, at_most)), device=device).long()


def _as_blocks(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[B, H, rows, columns]: whether a block is in the list."""
    live = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    dense = torch.zeros(*indices.shape[:-1], indices.shape[-1] + 1, dtype=torch.bool, device=counts.device)
    return dense.scatter_(-1, indices.long().where(live, indices.shape[-1]), True)[..., :-1]


def _real(value: Any) -> Any:
    """The tensor or number with which the graph's first call is made; None if it is not known."""
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
    """The size that was seen while tracing."""
    values = {}
    for node in view.graph.nodes:
        for value in (view.value(node), *getattr(view.tensor(node), "shape", ())):
            if isinstance(value, torch.SymInt) and as_sympy(value).is_Symbol:
                values[as_sympy(value)] = hint(value)
        if node.op != "placeholder":
            break
    return int(sympy.sympify(term).subs(values))


# -- code that only makes block masks ------------------------------------------------------------------------------

# Functions and methods that the vocabulary does not hold and that have no effect but their value, by name.
_VALUES = {
    "sum",
    "argsort",
    "pad",
    "_add_batch_dim",
    "_remove_batch_dim",
    "setitem",  # into a tensor that dies with it
}
_OPEN, _CLOSE, _LOAD = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"


def is_block_mask_code(node: fx.Node) -> bool:
    """Whether ``node`` can be erased once nobody uses it or what shares its memory."""
    return node.op == "get_attr" or _name(node) in _VALUES or node.target is torch.ops.aten.index


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def unused_batch_dims(graph: fx.Graph) -> list[fx.Node]:
    """Inputs of a mask_mod under torch.vmap that it does not read: dead in the author's graph already."""
    return [node for node in graph.nodes if _name(node) == "_add_batch_dim" and not node.users]


def erase_empty_brackets(graph: fx.Graph) -> None:
    """Erase the beginnings and ends of torch.vmap between which nothing is left."""
    opened: list[fx.Node] = []
    inside: list[int] = [0]
    for node in list(graph.nodes):
        if _name(node) == _OPEN:
            opened.append(node)
            inside.append(0)
        elif _name(node) == _CLOSE and opened:
            start, left = opened.pop(), inside.pop()
            if left == 0 and not start.users and not node.users:
                graph.erase_node(node)
                graph.erase_node(start)
            else:
                inside[-1] += 1
        elif _name(node) == _LOAD and not node.users:
            graph.erase_node(node)
        else:
            inside[-1] += 1
