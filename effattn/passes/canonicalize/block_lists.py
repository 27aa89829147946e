"""Block masks made outside the graph: their block lists become a table that the score can read.

FlexAttention's kernels visit only listed blocks, whatever mask_mod says, and a later call may bring other lists with
the same mask_mod. No guard would notice, and reading the lists would synchronise with the device. So they become data,
``mask_mod & listed[b, h, q // rows, k // columns]``: one boolean per pair of blocks, shared by layers. Which tiles a
kernel visits still follows from mask_mod.

Blocks listed as full count as listed, and mask_mod is applied in them too, as in PyTorch's eager implementation.
``create_block_mask`` lists no block as full in which that would change anything.
"""

from __future__ import annotations

from torch import fx

from effattn.passes.candidate.record import Refused
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.graph.insertion import Inserter
from effattn.passes.graph.view import as_sympy
from effattn.passes.graph.vocabulary import canonical, named
from effattn.passes.match.block_mask import TABLE, BlockMask


class TabulateBlockLists(Pass):
    """Inserts one table for the lists of every block mask that is an input; removes those that no site reads."""

    name = "tabulate block lists"
    optional = True

    def apply(self, work: Compilation) -> bool:
        self.tables = decompose(work.graph)
        return bool(self.tables)

    def undo(self, work: Compilation) -> bool:
        return restore_unused(work.graph, self.tables)


def decompose(graph: fx.Graph) -> list[fx.Node]:
    """Insert a table before every call whose lists are inputs; returns the inserted nodes."""
    tables: dict[tuple, fx.Node] = {}
    for node in list(graph.nodes):
        call = canonical(node) if named(node.target) == "flex_attention" else None
        if call is None:
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
            tables[known]._rename("blocks")  # the name in the report
    return list(tables.values())


def restore_unused(graph: fx.Graph, tables: list[fx.Node]) -> bool:
    """Erase tables without users."""
    unread = [table for table in tables if not table.users and table in set(graph.nodes)]
    for table in unread:
        graph.erase_node(table)
    return bool(unread)
