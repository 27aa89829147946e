"""Generated source into a running module.

What runs is the text that was generated a moment ago, never what a file holds: the copy in the cache directory is
there to be read by people. Triton takes the source of a kernel from ``inspect``, so ``linecache`` is told the text.
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from effattn.lowering.triton.source import file_name, generate
from effattn.lowering.triton.spec import KernelSpec


@dataclass(frozen=True)
class Kernel:
    """A generated kernel: its source, where a copy of it stands, and the module with ``launch`` in it."""

    spec: KernelSpec
    source: str
    path: Path
    module: ModuleType


@lru_cache(maxsize=1024)
def load(spec: KernelSpec) -> Kernel:
    """Generate the kernel of ``spec`` and make it callable; once per process and spec."""
    from effattn.runtime.cache import keep_source

    source = generate(spec)
    path = Path(keep_source(file_name(spec, source), source))
    return Kernel(spec, source, path, module_from(source, path))


def module_from(source: str, path: Path) -> ModuleType:
    """Execute ``source`` as a module that says it is the file ``path``."""
    module = ModuleType(f"effattn.generated.{path.stem}")
    module.__file__ = str(path)
    # an entry without a time of change is never compared with the file
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
