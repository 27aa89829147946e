"""What a repeated call does on the host: one look-up, and few calls of functions, whatever the machine.

The launch itself is left out: it is Triton's.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from plans import CASES, Sizes, tensors

import effattn
import effattn.runtime.ops
from effattn.ir.plan import Plan
from effattn.runtime import kernels, launching
from effattn.runtime.selection import triton_block_map
from effattn.runtime.selection.block_list import sizes_of_parts
from effattn.runtime.targets import sdpa

CPU = torch.device("cpu")
SIZES = Sizes(q_len=20, k_len=20)
CALLS = {"none": 16, "causal": 16, "window": 16, "soft_cap": 16, "alibi": 16}  # most calls of Python functions
BACKWARD = 25


@pytest.fixture(autouse=True)
def started_without_triton(monkeypatch):
    """Kernels that have been compiled and do nothing."""

    def start(known, kernel, grid, *arguments, **options):
        if kernel.__name__ not in known:
            known[kernel.__name__] = kernel
        STARTED[kernel.__name__] += 1

    def load(spec, load=kernels.load):
        kernel = load(spec)
        monkeypatch.setattr(kernel.module, "start", start)
        return kernel

    STARTED.clear()
    monkeypatch.setattr(kernels, "load", load)
    launching.forget()
    yield
    launching.forget()


STARTED: Counter[str] = Counter()


def functions_called(function) -> list[str]:
    """The names of Python functions that a call of ``function`` calls, in order."""
    names: list[str] = []

    def note(frame, event, _):
        if event == "call":
            names.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names[1:]


def repeated(name: str, made):
    call = CASES[name](SIZES, CPU)
    text = call.plan.dispatched(target="triton").encode()

    def run():
        # a new string in each call, as an op gets it
        return torch.ops.effattn.attend.default(*made, call.captures, call.scalars, call.numbers, text)

    run()
    return run


@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_is_one_look_up(name, monkeypatch):
    run = repeated(name, tensors(SIZES))
    for slow in ("decode", "at", "dense"):
        monkeypatch.setattr(Plan, slow, None)
    looked_up = []
    run_first = launching.LaunchCache.run
    monkeypatch.setattr(launching.LaunchCache, "run", lambda *args: looked_up.append(1) or run_first(*args))
    STARTED.clear()
    with torch.no_grad():
        called = functions_called(run)
    assert STARTED["forward"] == 1
    assert looked_up == []  # beside the call's own
    assert called.count("launch_key") == 1
    assert len(called) <= CALLS[name], called


def test_what_a_gradient_adds():
    made = [tensor.requires_grad_() for tensor in tensors(SIZES)]
    called = functions_called(repeated("causal", made))
    assert STARTED["forward"] == 2
    assert len(called) <= 2 * CALLS["causal"], called


def test_the_plain_function():
    made = tensors(SIZES)
    effattn.attention(*made, form="window", window=9)
    called = functions_called(lambda: effattn.attention(*made, form="window", window=9))
    assert not {"_written", "Plan.encode"} & set(called)


def test_sdpas_kernel_is_chosen_once(monkeypatch):
    """Its rule, its scale and the places of its tensors are not looked at again."""
    made = tensors(Sizes(1, 2, 1, 300, 300))
    text = CASES["scale_at_run_time"](Sizes(1, 2, 1, 300, 300), CPU).plan.encode()
    run = lambda: torch.ops.effattn.attend.default(*made, [], [], [0.3], text)  # noqa: E731
    with torch.no_grad():
        run()
        called = functions_called(run)
    assert not {"evaluate", "evaluate_integer", "dense_kind", "bindings", "lies_well"} & set(called)
    assert len(called) <= CALLS["causal"], called


def test_a_repeated_backward(monkeypatch):
    made = tensors(SIZES)
    text = CASES["causal"](SIZES, CPU).plan.dispatched(target="triton").encode()
    out, lse = torch.ops.effattn.attend.default(*made, [], [], [], text)
    run = lambda: torch.ops.effattn.attend_backward.default(out, None, *made, out, lse, [], [], [], text, [])  # noqa: E731
    run()
    for slow in ("decode", "at", "dense"):
        monkeypatch.setattr(Plan, slow, None)
    STARTED.clear()
    with torch.no_grad():
        called = functions_called(run)
    assert STARTED["grad_query"] == STARTED["grad_key_value"] == 1
    assert not {"target_of", "serving"} & set(called)
    assert len(called) <= BACKWARD, called


def test_pytorchs_choice_among_its_kernels_is_kept(monkeypatch):
    """For as long as the user's settings, and what needs a gradient, stay the same."""
    choices = []
    flash = torch._scaled_dot_product_flash_attention_for_cpu

    def choice(*given, **more):
        choices.append(1)
        return sdpa.FLASH

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    monkeypatch.setattr(
        torch,
        "_scaled_dot_product_flash_attention",
        lambda q, k, v, p, causal, mask, scale: flash(q, k, v, scale=scale),
    )
    made, chosen = tensors(Sizes(1, 2, 2, 30, 30)), {}

    def run():
        sdpa._fused(*made, False, 0.3, chosen)
        return len(choices)

    assert [run(), run()] == [1, 1]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert [run(), run()] == [2, 2]
    orders = [torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.FLASH_ATTENTION]
    with torch.nn.attention.sdpa_kernel(orders, set_priority=True):
        assert [run(), run()] == [3, 3]
    made[0].requires_grad_()
    assert [run(), run()] == [4, 4]
    with torch.no_grad():
        assert [run(), run()] == [5, 5]
    assert len(chosen) == 5


def test_a_compiled_kernel_takes_the_addresses_of_a_block_map(monkeypatch):
    shape, asked = (2, 3, 5, 7), triton_block_map.lists_in
    parts = torch.zeros(sum(sizes_of_parts(shape)), dtype=torch.int32)
    tensors = asked(parts, shape, first=True)
    assert [tuple(each.shape) for each in tensors] == [shape, shape[:3], shape[:3]]
    assert all(
        isinstance(each, torch.Tensor) for each in asked(parts, shape, first=False)
    )  # the interpreter needs them
    monkeypatch.setattr(triton_block_map, "interpreted", lambda device: False)
    assert asked(parts, shape, first=False) == tuple(each.data_ptr() for each in tensors)
