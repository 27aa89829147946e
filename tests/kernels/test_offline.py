"""Kernels compile for GPUs that are not here, without spilling, within their shared memory."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from specs import compiled

# bytes a thread may keep in memory where no tile size avoids it without costing more elsewhere
SPILLS_ALLOWED = {"causal D 256 sm90": 32, "causal D 96 sm80": 64}


@functools.cache
def used() -> dict[str, list[int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", compiled())
def test_compiles_without_spills(name):
    registers, spilled, shared, limit = used()[name]
    assert registers > 16
    assert spilled <= SPILLS_ALLOWED.get(name, 0)
    assert 0 < shared <= limit
