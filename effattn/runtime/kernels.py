"""Kernels by specialisation: generated, copied to disk, and loaded from the text in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from effattn.lowering.dialects.triton.module import module_from
from effattn.lowering.kernels.generate import file_name, generate
from effattn.lowering.kernels.spec import KernelSpec
from effattn.runtime.cache import keep_source


@dataclass(frozen=True)
class Kernel:
    """A generated kernel: its source, the path of its copy on disk, and the module with ``launch``."""

    spec: KernelSpec
    source: str
    path: Path
    module: ModuleType


def capture_source(stem: str, source: str) -> ModuleType:
    """Load generated source as a module. Its copy on disk is named ``stem`` plus a digest."""
    path = keep_source(f"{stem}_{hashlib.sha256(source.encode()).hexdigest()[:8]}.py", source)
    return module_from(source, path)


@lru_cache(maxsize=1024)
def load(spec: KernelSpec) -> Kernel:
    """The kernel of ``spec``, generated once per process."""
    source = generate(spec)
    path = keep_source(file_name(spec, source), source)
    return Kernel(spec, source, path, module_from(source, path))
