"""How generated kernels are started: first by Triton, then from what it found out, past its own look-ups.

Generated files import this. On NVIDIA GPUs later calls go straight to the function in C that starts a kernel, and what
describes tiles of a tensor to it is kept by the tensor's address.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from effattn.lowering.device import device_type
from effattn.versions import quick_empty

KNOWN_VERSIONS = ("3.6.", "3.7.")  # of Triton: how its launchers are made
MOST_ADDRESSES = 256  # descriptors that are kept of one parameter of one kernel


def start(known: dict[str, Any], kernel: Any, grid: tuple[int, int, int], *arguments: Any, **options: Any) -> None:
    """Start a kernel. ``known`` keeps what Triton compiled for calls of these shapes, strides and alignment."""
    again = known.get(kernel.__name__)
    if again is not None:
        again(arguments)
        return
    compiled = kernel[grid](*arguments, **options)
    if compiled is not None:  # the interpreter compiles nothing
        known[kernel.__name__] = repeated(compiled, grid, arguments)


def repeated(compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> Callable[[Sequence[Any]], None]:
    """What starts ``compiled`` on the current device, without what Triton does for hooks that nobody has set.

    ``arguments``: those of the first call.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    device, stream_of = driver.active.get_current_device(), driver.active.get_current_stream
    run, hooks = launcher_of(compiled, arguments), knobs.runtime

    def start_again(arguments: Sequence[Any]) -> None:
        enter, leave, stream = hooks.launch_enter_hook, hooks.launch_exit_hook, stream_of(device)
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            run(*grid, stream, compiled.launch_metadata(grid, stream), enter, leave, arguments)
        else:
            run(*grid, stream, None, None, None, arguments)

    return start_again


def launcher_of(compiled: Any, arguments: Sequence[Any]) -> Callable[..., None]:
    """``run(x, y, z, stream, metadata, enter, leave, arguments)``: the function in C, or Triton's call of it."""
    described = [each.tiles for each in arguments if hasattr(each, "tiles")]
    in_c = _in_c(compiled)
    if in_c is not None and (not described or _settle(described, compiled.metadata)):
        return in_c
    launch, settled = compiled.run, (compiled.function, compiled.packed_metadata)

    def run(x, y, z, stream, metadata, enter, leave, arguments):
        launch(x, y, z, stream, *settled, metadata, enter, leave, *arguments)

    return run


def _in_c(compiled: Any) -> Callable[..., None] | None:
    """The function in C that starts a kernel on NVIDIA GPUs; None if it is not known, or the launcher does more."""
    import triton

    if not triton.__version__.startswith(KNOWN_VERSIONS):
        return None
    launch, packed = compiled.run, compiled.packed_metadata
    scratch = [getattr(launch, f"{name}_scratch_size", 1) for name in ("global", "profile")]
    if type(launch).__name__ != "CudaLauncher" or any(scratch):
        return None
    before = (compiled.function, launch.launch_cooperative_grid, launch.launch_pdl)
    if hasattr(launch, "kernel_signature"):  # Triton 3.7
        from triton.runtime.driver import driver

        start, types = driver.active.utils.launch, (None, None, launch.arg_annotations, launch.kernel_signature)

        def run(x, y, z, stream, metadata, enter, leave, arguments):
            start(x, y, z, stream, *before, packed, metadata, enter, leave, *types, arguments)

    else:
        start = _beneath(launch.launch)

        def run(x, y, z, stream, metadata, enter, leave, arguments):
            start(x, y, z, stream, *before, None, None, packed, metadata, enter, leave, *arguments)

    return run


def _beneath(launch: Any) -> Callable[..., Any]:
    """The function in C of a kernel, beneath the one that fills descriptors (Triton 3.6)."""
    names = launch.__code__.co_freevars if hasattr(launch, "__code__") else ()
    return launch.__closure__[names.index("launcher")].cell_contents if "launcher" in names else launch


def _settle(described: Sequence[Tiles], metadata: Any) -> bool:
    """Let each parameter be filled as its kernel wants it; False if Triton does not say how."""
    from triton.backends.nvidia import driver

    found = getattr(metadata, "tensordesc_meta", None)
    if not found or len(found) != len(described) or None in found:
        return False
    for tiles, each in zip(described, found, strict=True):
        tiles.fill = lambda descriptor, each=each: driver.make_tensordesc_arg(descriptor, each)
    return True


class Address:
    """What a descriptor needs of a tensor: where it is."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class Tiles(dict[int, tuple[Any, ...]]):
    """The arguments for which a parameter of a kernel stands that reads tiles of a tensor, by the tensor's address.

    They hold the address, sizes and strides, and nothing of the tensor.
    """

    fill: Callable[[Any], Sequence[Any]] | None = None  # None: the kernel's launcher takes descriptors

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.descriptor = copy.copy(descriptor)
        self.descriptor.base = None

    def __missing__(self, address: int) -> tuple[Any, ...]:
        descriptor = copy.copy(self.descriptor)
        descriptor.base = Address(address)
        found = (descriptor,) if self.fill is None else tuple(self.fill(descriptor))
        if len(self) >= MOST_ADDRESSES:
            self.clear()
        self[address] = found
        return found


def described(known: dict[str, Any], name: str, descriptor: Any) -> tuple[Any, ...]:
    """The argument for a descriptor in a first call; ``known[name]`` has the arguments of later ones, by address."""
    known[name] = descriptor.tiles = Tiles(descriptor)
    return (descriptor,)


@lru_cache(maxsize=64)
def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """A function of sizes, strides and dtype: an uninitialised tensor on ``device``, which must be the current one."""
    return quick_empty(device.type) or partial(_empty, device)


def _empty(device: torch.device, shape: tuple[int, ...], steps: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, steps, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many programs of a large kernel run at the same time."""
    if device_type(device.type).kernels == "interpreted":
        return 4
    count: int = torch.get_device_module(device).get_device_properties(device).multi_processor_count
    return count


def strides(tensor: Any) -> list[int]:
    """Strides of a tensor; a dimension of size 1 gets stride 0, so that any index stands for its one element."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def data_strides(captures: Sequence[Any], tested: Sequence[Sequence[int]]) -> list[int]:
    """Strides of the tensors that predicate and score read, and those of their sizes that kernels test (``tested``)."""
    found = []
    for tensor, dims in zip(captures, tested, strict=False):
        found += strides(tensor)
        found += [0x7FFFFFFF if tensor.shape[dim] == 1 else tensor.shape[dim] for dim in dims]
    return found


def sizes_of(lists: Sequence[Any]) -> tuple[int, ...]:
    """Strides of batch and list of a block list's tensors, how many lists and counts there are, how long they are."""
    steps = [step for each in lists for step in strides(each)[:2]]
    return (*steps, lists[0].shape[1], lists[1].shape[1], lists[0].shape[3])
