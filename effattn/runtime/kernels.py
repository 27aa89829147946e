"""Kernels by specialisation: generated, kept on disk for people to read, made callable.

What runs is the text that was generated a moment ago, never what a file holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from effattn.lowering.dialects.triton.module import module_from
from effattn.lowering.kernels.source import file_name, generate
from effattn.lowering.kernels.spec import KernelSpec
from effattn.runtime.cache import keep_source


@dataclass(frozen=True)
class Kernel:
    """A generated kernel: its source, where a copy of it stands, and the module with ``launch`` in it."""

    spec: KernelSpec
    source: str
    path: Path
    module: ModuleType


def capture_source(stem: str, source: str) -> ModuleType:
    """A generated module by its source; ``stem`` names its copy on disk, with a digest behind it."""
    path = keep_source(f"{stem}_{hashlib.sha256(source.encode()).hexdigest()[:8]}.py", source)
    return module_from(source, path)


@lru_cache(maxsize=1024)
def load(spec: KernelSpec) -> Kernel:
    """Generate the kernel of ``spec`` and make it callable; once per process and spec."""
    source = generate(spec)
    path = keep_source(file_name(spec, source), source)
    return Kernel(spec, source, path, module_from(source, path))
