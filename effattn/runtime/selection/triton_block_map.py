"""Block maps by generated kernels, with the same results as :mod:`block_map`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from effattn.ir.attention import AttentionSpec
from effattn.lowering.iteration.intervals import Chunks
from effattn.lowering.kernels.selection.block_map import MapSpec, chunks_of, generate
from effattn.runtime import kernels
from effattn.runtime.launching import Known, LaunchCache, far, interpreted, on_device, tensor_key, width
from effattn.runtime.selection import block_map as portable
from effattn.runtime.selection.block_list import BlockList, places_of_parts
from effattn.runtime.selection.block_map import Wanted


def block_map(wanted: Wanted) -> BlockList:
    """The list of every block of queries, or of keys; as :func:`effattn.runtime.selection.block_map.block_map`."""
    return BlockList.of_parts(parts_of_map(wanted), wanted.shape, wanted.block, wanted.unit)


def parts_of_map(wanted: Wanted) -> Tensor:
    """The same as one tensor; see :meth:`BlockList.parts`."""
    attention, sizes, captures, scalars, numbers, block, unit, device, transposed = wanted
    if 0 in sizes:
        return portable.block_map(wanted).parts()

    def prepared() -> _Call:
        spec = MapSpec(attention, *wanted.tile, transposed, far(*sizes, *scalars))
        spec = replace(spec, chunks=chunks_of(spec))
        return _Call(attention, _launcher(spec), spec.chunks)

    def started(call: _Call) -> tuple[Tensor, Known]:
        given = captures
        if call.chunks:
            by_name = dict(zip((load.name for load in attention.captures), captures, strict=True))
            given = [*captures, *(end for one in call.chunks for end in portable.extremes(by_name[one.name], one))]
        with on_device(device):
            return call.launch(*sizes, given, scalars, [float(each) for each in numbers], device, call.known)

    # by id, since hashing expressions is slow; the call keeps the record alive
    key = (id(attention), block, unit, transposed, sizes, device, *map(tensor_key, captures), *map(width, scalars))
    return CALLS.run(key, prepared, started)


def lists_in(parts: Tensor, shape: tuple[int, ...], *, first: bool) -> tuple[Any, Any, Any]:
    """The three tensors of a block map for a kernel; ``shape``: of ``kv_indices``.

    ``first``: whether the kernel is not compiled yet. Later it takes addresses, too, which are found sooner.
    """
    if first or interpreted(parts.device):
        return BlockList.of_parts(parts, shape, 0, 0).tensors()
    address = parts.data_ptr()
    indices, counts, partial = places_of_parts(shape)
    return address + indices, address + counts, address + partial


@dataclass(frozen=True)
class _Call:
    given: AttentionSpec
    launch: Callable[..., Any]
    chunks: tuple[Chunks, ...] = ()  # whose extremes it reads, after the captured tensors
    known: Known | None = None


CALLS = LaunchCache()


@lru_cache(maxsize=1024)
def _launcher(spec: MapSpec) -> Callable[..., Any]:
    name = "queries_of_keys" if spec.transposed else "keys_of_queries"
    return kernels.capture_source(f"{name}_{spec.block_m}x{spec.block_n}", generate(spec)).launch
