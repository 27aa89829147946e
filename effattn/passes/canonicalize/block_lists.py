"""Block masks that are made outside of the graph: their lists of blocks as one table that the score can read.

FlexAttention's kernels visit only what is listed, whatever mask_mod says, and a later call may bring other lists with
the same mask_mod. No guard would see that, and to look at lists costs a wait for the device. So they take part as data,
``mask_mod & listed[b, h, q // rows, k // columns]``: a table with one boolean for each pair of blocks, which several
layers share. Which tiles a kernel visits still follows from mask_mod.

A block that is listed as full is taken for listed, and mask_mod is applied in it too, as PyTorch's code without kernels
does; ``create_block_mask`` lists no block as full in which it would change anything.
"""

from __future__ import annotations

from torch import fx

from effattn.passes.candidate.record import Refused
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.graph.insertion import Inserter
from effattn.passes.graph.view import as_sympy
from effattn.passes.graph.vocabulary import canonical
from effattn.passes.match.block_mask import TABLE, BlockMask


class TabulateBlockLists(Pass):
    """One table for the lists of every block mask that is an input; those that no site reads are taken out again."""

    name = "tabulate block lists"
    optional = True

    def apply(self, work: Compilation) -> bool:
        self.tables = decompose(work.graph)
        return bool(self.tables)

    def undo(self, work: Compilation) -> bool:
        return restore_unused(work.graph, self.tables)


def decompose(graph: fx.Graph) -> list[fx.Node]:
    """Put a table before every call whose lists are inputs; the nodes that were put in."""
    tables: dict[tuple, fx.Node] = {}
    for node in list(graph.nodes):
        call = canonical(node)
        if call is None or call.name != "flex_attention":
            continue
        try:
            mask = BlockMask.of(call)
        except Refused:
            continue
        if not mask.come_from_outside:
            continue
        key = call.get("key")
        known = (*mask.lists, mask.kv_block, as_sympy(key.meta["example_value"].shape[2]))
        if known not in tables:
            insert = Inserter(graph, node)
            with graph.inserting_before(node):
                tables[known] = insert.call(TABLE, *mask.lists, key, mask.kv_block)
            tables[known]._rename("blocks")  # as the report shows it
    return list(tables.values())


def restore_unused(graph: fx.Graph, tables: list[fx.Node]) -> bool:
    """Erase the tables that nobody reads after all."""
    unread = [table for table in tables if not table.users and table in set(graph.nodes)]
    for table in unread:
        graph.erase_node(table)
    return bool(unread)
