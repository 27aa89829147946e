"""Kernels compile for GPUs that are not here, without spilling, within their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from specs import ARCHS

# Bytes that a thread keeps in memory where no tile size avoids it without costing more elsewhere, in each release of
# Triton, which brings its own assembler. A release that is not listed is held to the last one that is.
HOPPER = {  # every release: masks and scores read so much at once, and smaller tiles cost more than they save
    "hopper alibi D 64 sm90": 24,
    "hopper bias listed sm90": 144,
    "hopper documents listed sm90": 16,
    "hopper power_128 listed sm90": 64,
    "hopper power_128 listed D 64 sm90": 40,
    "hopper window D 64 sm90": 16,
    "hopper alibi D 128 grad_key_value sm90": 40,
    "hopper causal D 64 grad_key_value sm90": 8,
    "hopper causal D 128 grad_key_value sm90": 8,
    "hopper soft_cap D 128 grad_key_value sm90": 96,
    "hopper documents grad_key_value sm90": 96,
    "hopper shared sinks grad_key_value sm90": 40,
}
SPILLS = {
    "3.6": {
        "bias prefill sm80": 32,
        "tokens listed sm80": 48,
        "decode fp32 sm90": 8,
        "causal grad_query sm100": 8,
        "lightning outputs sm90": 40,
        "F 60 outputs sm90": 24,
        "Hedgehog outputs sm100": 8,
    },
    "3.7": {
        "causal D 256 sm90": 32,
        "lightning outputs sm90": 32,
        "F 60 outputs sm90": 16,
        "fp16 outputs sm90": 8,
    },
    "3.8": {
        "causal D 256 sm90": 32,
        "documents prefill sm100": 104,
        "lightning outputs sm90": 32,
        "fp16 outputs sm90": 32,
    },
}


def used(arch: str) -> dict[str, list[int]]:
    """Kernel -> registers of a thread, bytes that it spilled, bytes of shared memory and how many there are."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run([sys.executable, script, arch], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_fit(arch):
    release = ".".join(triton.__version__.split(".")[:2])
    allowed = HOPPER | (SPILLS.get(release) or list(SPILLS.values())[-1])
    found = used(arch)
    assert len(found) > 30
    assert all(registers > 4 for registers, *_ in found.values())
    assert {name: spilled for name, (_, spilled, *_) in found.items() if spilled > allowed.get(name, 0)} == {}
    assert {name: shared for name, (*_, shared, limit) in found.items() if shared > limit} == {}
