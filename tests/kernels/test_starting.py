"""How a kernel is started again: what Triton found out in the first call is kept, and so are descriptors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton
from triton import knobs
from triton.runtime.driver import driver

from effattn.lowering.dialects.triton import starting
from effattn.lowering.dialects.triton.starting import start
from effattn.lowering.kernels.rendering import template_named


@pytest.fixture(autouse=True)
def a_device(monkeypatch):
    """The third one, whose current stream is 307; it notes what the function in C of Triton 3.7 is given."""
    utils = SimpleNamespace(launched=[], launch=lambda *arguments: utils.launched.append(arguments))
    device = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 100 * device + 7)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(**vars(device), utils=utils))
    return utils


class Compiled:
    """A compiled kernel that notes what it is given."""

    def __init__(self, described: int = 0):
        self.runs: list = []
        self.run = lambda *arguments: self.runs.append(arguments)
        self.function, self.packed_metadata = "function", "metadata"
        self.metadata = SimpleNamespace(tensordesc_meta=[{"place": place} for place in range(described)])

    def launch_metadata(self, grid, stream):
        return ("launch", grid, stream)


class CudaLauncher:
    """As Triton's: what starts a kernel with descriptors is wrapped in 3.6, and takes one list of arguments in 3.7."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid, launch_pdl = "cooperative", "dependent"

    def __init__(self, compiled: Compiled, version: str, described: int = 0):
        def launcher(*arguments):
            compiled.runs.append(arguments)

        def inner(*arguments):
            raise AssertionError(f"{launcher} is called")

        self.launch = inner if described else launcher
        if version == "3.7":
            self.arg_annotations, self.kernel_signature = "annotations", "signature"


class Kernel:
    __name__ = "forward"

    def __init__(self, compiled):
        self.compiled, self.first = compiled, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.first.append((grid, arguments, options))
            return self.compiled

        return launch


def test_later_calls_skip_triton():
    kernel, known = Kernel(Compiled()), {}
    start(known, kernel, (5, 1, 1), "a", 2, num_warps=4)
    start(known, kernel, (5, 1, 1), "b", 2, num_warps=4)
    assert kernel.first == [((5, 1, 1), ("a", 2), {"num_warps": 4})]
    assert kernel.compiled.runs == [(5, 1, 1, 307, "function", "metadata", None, None, None, "b", 2)]


def test_the_function_in_c(a_device, monkeypatch):
    """Of the launcher that Triton makes for NVIDIA GPUs."""
    for version in ("3.6", "3.7"):
        monkeypatch.setattr(triton, "__version__", f"{version}.0")
        kernel, known = Kernel(Compiled()), {}
        kernel.compiled.run = CudaLauncher(kernel.compiled, version)
        for argument in "ab":
            start(known, kernel, (5, 1, 1), argument, 2)
        before, how = (5, 1, 1, 307, "function", "cooperative", "dependent"), ("metadata", None, None, None)
        if version == "3.6":
            assert kernel.compiled.runs == [(*before, None, None, *how, "b", 2)]
        else:
            assert a_device.launched == [(*before, *how, None, None, "annotations", "signature", ("b", 2))]


def test_the_launcher_of_another_triton_is_called(monkeypatch, a_device):
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    kernel, known, called = Kernel(Compiled()), {}, []
    has = {"__call__": lambda self, *given: called.append(given)}
    kernel.compiled.run = type("CudaLauncher", (CudaLauncher,), has)(kernel.compiled, "3.7")
    for argument in "ab":
        start(known, kernel, (5, 1, 1), argument)
    assert called == [(5, 1, 1, 307, "function", "metadata", None, None, None, "b")]
    assert a_device.launched == []


@pytest.mark.parametrize("size", ["global_scratch_size", "profile_scratch_size"])
def test_a_launcher_that_needs_room_is_called_as_triton_does(size, a_device):
    kernel, known, called = Kernel(Compiled()), {}, []
    has = {size: 16, "__call__": lambda self, *given: called.append(given)}
    kernel.compiled.run = type("CudaLauncher", (CudaLauncher,), has)(kernel.compiled, "3.7")
    for argument in "ab":
        start(known, kernel, (5, 1, 1), argument)
    assert called == [(5, 1, 1, 307, "function", "metadata", None, None, None, "b")]
    assert a_device.launched == []


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called_once_somebody_sets_them(which):
    """As a profiler does, in the midst of a program."""
    kernel, known = Kernel(Compiled()), {}
    for argument in "ab":
        start(known, kernel, (5, 1, 1), argument)
    hooks = getattr(knobs.runtime, which)
    called = lambda metadata: None  # noqa: E731
    hooks.add(called)
    try:
        start(known, kernel, (5, 1, 1), "c")
    finally:
        hooks.remove(called)
    start(known, kernel, (5, 1, 1), "d")
    chains = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    none, told = (None, None, None), (("launch", (5, 1, 1), 307), *chains)
    assert [run[6:] for run in kernel.compiled.runs] == [(*none, "b"), (*told, "c"), (*none, "d")]


def test_the_interpreter_is_started_every_time():
    kernel, known = Kernel(None), {}
    for argument in "ab":
        start(known, kernel, (1, 1, 1), argument)
    assert [arguments for _, arguments, _ in kernel.first] == [("a",), ("b",)]
    assert known == {}


@pytest.fixture
def tiles_of():
    """The function of hopper_host.jinja."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    functions: dict = {"gl": gl, "TensorDescriptor": TensorDescriptor, "described": starting.described}
    spec = SimpleNamespace(block_d=64, block_dv=64)
    exec(template_named("hopper_host.jinja").render(spec=spec, listed=False), functions)
    return lambda *given: functions["tiles_of"](*given, 64, 64)


TENSORS = [torch.zeros(1, 2, 40, 64, dtype=torch.bfloat16) for _ in range(3)]


def test_a_descriptor_differs_from_the_first_in_its_address_alone(tiles_of):
    """Where it is not known how the kernel is started beneath its launcher."""
    known: dict = {}
    (made,), (again,) = tiles_of(known, "query", TENSORS[0]), tiles_of(known, "query", TENSORS[1])
    assert made.base is TENSORS[0]
    assert again.base.data_ptr() == TENSORS[1].data_ptr()
    fields = ("shape", "strides", "block_shape", "layout", "padding")
    assert [getattr(again, name) for name in fields] == [getattr(made, name) for name in fields]
    assert tiles_of(known, "query", TENSORS[1])[0] is again


@pytest.mark.parametrize("version", ["3.6", "3.7"])
def test_descriptors_are_filled_once_for_each_address(version, tiles_of, monkeypatch, a_device):
    from triton.backends.nvidia import driver as nvidia

    filled = []

    def fill(descriptor, metadata):
        filled.append((descriptor.base.data_ptr(), metadata["place"]))
        return [f"map of {len(filled)}", *descriptor.shape, *descriptor.strides]

    monkeypatch.setattr(nvidia, "make_tensordesc_arg", fill)
    monkeypatch.setattr(triton, "__version__", f"{version}.0")
    kernel, known = Kernel(Compiled(described=2)), {}
    kernel.compiled.run = CudaLauncher(kernel.compiled, version, described=2)
    addresses = [tensor.data_ptr() for tensor in TENSORS]
    for q, k in ((0, 1), (0, 2), (0, 2)):
        start(known, kernel, (5, 1, 1), *tiles_of(known, "query", TENSORS[q]), *tiles_of(known, "key", TENSORS[k]), 7)
    assert filled == [(addresses[0], 0), (addresses[2], 1)]  # the first call is Triton's own
    layout = (1, 2, 40, 64, 5120, 2560, 64, 1)
    given = [run[-1] if version == "3.7" else run[-19:] for run in a_device.launched + kernel.compiled.runs]
    assert given == 2 * [
        ("map of 1", 1, *layout[1:4], 16, *layout[5:], "map of 2", 1, *layout[1:4], 16, *layout[5:], 7)
    ]


def test_no_tensor_is_kept(tiles_of):
    known: dict = {}
    tiles_of(known, "query", TENSORS[0])
    tiles = known["query"]
    assert tiles.descriptor.base is None
    assert not any(isinstance(value, torch.Tensor) for value in vars(tiles.descriptor).values())


def test_few_addresses_are_kept():
    tiles = starting.Tiles(SimpleNamespace(base=None))
    for address in range(3 * starting.MOST_ADDRESSES):
        assert tiles[address][0].base.data_ptr() == address
    assert len(tiles) <= starting.MOST_ADDRESSES
