"""Devices and targets are told apart by their tables alone: no module compares a device or a target with a name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import effattn
from effattn.lowering.device import DEVICE_TYPES, DeviceType, device_type
from effattn.runtime.targets.choice import ANYWHERE, TARGETS, asked_for, chosen

ROOT = Path(effattn.__file__).parent
TYPES = {"cpu", "cuda", "hip", "xpu", "mps", "npu", "hpu", "mtia", "xla", *DEVICE_TYPES}
# where names of devices are at home: torch's in the table, Triton's own in what compiles for GPUs that are not there
AT_HOME = {"lowering/device.py", "lowering/kernels/offline.py"}


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def files() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def test_no_name_of_a_device_but_in_the_table():
    found = [
        f"{name}:{line}: {text!r}"
        for name, tree in files()
        if name not in AT_HOME
        for line, text in strings(tree)
        if text.partition(":")[0] in TYPES
    ]
    assert not found, "\n".join(found)


def test_nothing_is_compared_with_the_name_of_a_target():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        for text in getattr(side, "elts", [side])
        if isinstance(text, ast.Constant) and text.value in TARGETS
    ]
    assert not found, "\n".join(found)


def test_no_module_of_torch_for_one_type_of_device():
    """``torch.cuda`` and the like: what they tell is asked through ``effattn.runtime.machine``."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        if node.attr in TYPES
    ]
    assert not found, "\n".join(found)


def test_every_row_names_a_target():
    assert {row.target for row in DEVICE_TYPES.values()} <= set(TARGETS)
    assert TARGETS[ANYWHERE].why_not_on("anything") is None


@pytest.mark.parametrize("target", TARGETS)
def test_a_new_type_of_device_is_a_row(target, monkeypatch):
    assert asked_for(None, "npu") is TARGETS[ANYWHERE]
    monkeypatch.setitem(DEVICE_TYPES, "npu", DeviceType("npu", target, "compiled"))
    assert asked_for(None, "npu") is TARGETS[target]
    assert device_type("npu").kernels == "compiled"
    assert chosen(None, "npu", lambda one: None) == (TARGETS[target], None)
    assert chosen("triton", "npu", lambda one: None) == (TARGETS["triton"], None)


def test_what_every_target_says_is_the_protocol():
    dtype = torch.float32
    for target in TARGETS.values():
        for asked in (target.why_not_on("nowhere"), target.linear.why_not(dtype, 10**6, 10**6)):
            assert asked is None or asked.reason
