"""Block maps by generated kernels, with the same results as :mod:`block_map`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from effattn.ir.attention import AttentionSpec
from effattn.lowering.kernels.selection.block_map import MapSpec, generate
from effattn.runtime import kernels
from effattn.runtime.launching import Known, LaunchCache, far, on_device, tensor_key, width
from effattn.runtime.selection import block_map as portable
from effattn.runtime.selection.block_list import BlockList
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
        return _Call(attention, _launcher(spec))

    def started(call: _Call) -> tuple[Tensor, Known]:
        with on_device(device):
            return call.launch(*sizes, captures, scalars, [float(each) for each in numbers], device, call.known)

    # by id, since hashing expressions is slow; the call keeps the record alive
    key = (id(attention), block, unit, transposed, sizes, device, *map(tensor_key, captures), *map(width, scalars))
    return CALLS.run(key, prepared, started)


@dataclass(frozen=True)
class _Call:
    given: AttentionSpec
    launch: Callable[..., Any]
    known: Known | None = None


CALLS = LaunchCache()


@lru_cache(maxsize=1024)
def _launcher(spec: MapSpec) -> Callable[..., Any]:
    name = "queries_of_keys" if spec.transposed else "keys_of_queries"
    return kernels.capture_source(f"{name}_{spec.block_m}x{spec.block_n}", generate(spec)).launch
