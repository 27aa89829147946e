"""How a kernel is started again: what Triton found out in the first call is kept, and so are descriptors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton import knobs
from triton.runtime.driver import driver

from effattn.lowering.kernels.rendering import template_named


@pytest.fixture
def started(monkeypatch):
    """The functions of start.jinja, and a compiled kernel on a device that notes what it is given."""
    functions: dict = {}
    exec(template_named("start.jinja").render(), functions)
    device = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 100 * device + 7)
    monkeypatch.setattr(driver, "_active", device)
    return functions


class Compiled:
    def __init__(self):
        self.runs, self.hooked = [], []
        self.function, self.packed_metadata = "function", "metadata"

    def run(self, *arguments):
        self.runs.append(arguments)

    def __getitem__(self, grid):
        return lambda *arguments: self.hooked.append((grid, *arguments))


class Kernel:
    __name__ = "forward"

    def __init__(self):
        self.compiled, self.first = Compiled(), []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.first.append((grid, arguments, options))
            return self.compiled

        return launch


def test_later_calls_skip_triton(started):
    kernel, known = Kernel(), {}
    started["start"](known, kernel, (5, 1, 1), "a", 2, num_warps=4)
    started["start"](known, kernel, (5, 1, 1), "b", 2, num_warps=4)
    assert kernel.first == [((5, 1, 1), ("a", 2), {"num_warps": 4})]
    assert kernel.compiled.runs == [(5, 1, 1, 307, "function", "metadata", None, None, None, "b", 2)]
    assert kernel.compiled.hooked == []


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called_once_somebody_sets_them(started, monkeypatch, which):
    """As a profiler does, in the midst of a program."""
    kernel, known = Kernel(), {}
    for argument in "ab":
        started["start"](known, kernel, (5, 1, 1), argument)
    hooks = getattr(knobs.runtime, which)
    called = lambda metadata: None  # noqa: E731
    hooks.add(called)
    try:
        started["start"](known, kernel, (5, 1, 1), "c")
    finally:
        hooks.remove(called)
    started["start"](known, kernel, (5, 1, 1), "d")
    assert kernel.compiled.hooked == [((5, 1, 1), "c")]
    assert [run[-1] for run in kernel.compiled.runs] == ["b", "d"]


def test_the_interpreter_is_started_every_time(started):
    kernel, known = Kernel(), {}
    kernel.compiled = None
    for argument in "ab":
        started["start"](known, kernel, (1, 1, 1), argument)
    assert [arguments for _, arguments, _ in kernel.first] == [("a",), ("b",)]
    assert known == {}


def test_a_descriptor_differs_from_the_first_in_its_address_alone():
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    functions: dict = {"gl": gl, "TensorDescriptor": TensorDescriptor}
    spec = SimpleNamespace(block_d=64, block_dv=64)
    exec(template_named("hopper_host.jinja").render(spec=spec, tested=[], listed=False), functions)
    known: dict = {}
    first, second = (torch.zeros(1, 2, 40, 64, dtype=torch.bfloat16) for _ in range(2))
    made = functions["tiles_of"](known, "query", first, 64, 64)
    again = functions["tiles_of"](known, "query", second, 64, 64)
    assert isinstance(made, TensorDescriptor)
    assert again.base is second
    assert made.base is first
    assert {name: getattr(again, name) for name in vars(made) if name != "base"} == {
        name: value for name, value in vars(made).items() if name != "base"
    }
    assert known["query"].base is None  # no tensor is kept alive
