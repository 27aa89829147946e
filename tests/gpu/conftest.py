"""Everything in this folder needs an NVIDIA GPU, and kernels that are compiled for it: no interpreter."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch

HERE = pathlib.Path(__file__).parent

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes compile at once: each with few threads
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")


def missing() -> str | None:
    """Why nothing in this folder can run, if so."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "needs compiled kernels, and Triton's interpreter is on in this run: run tests/gpu alone"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Each test compiles what it needs, and its graphs and memory are gone when it ends."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
