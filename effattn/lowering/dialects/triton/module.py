"""Generated source as a running module, without a file having a say in it."""

from __future__ import annotations

import linecache
from pathlib import Path
from types import ModuleType


def module_from(source: str, path: Path) -> ModuleType:
    """Execute ``source`` as a module that says it is the file ``path``, whatever stands there.

    Triton takes the text of a kernel from ``inspect``, which asks ``linecache``; an entry there that has no time of
    change is never compared with the file.
    """
    module = ModuleType(f"effattn.generated.{path.stem}")
    module.__file__ = str(path)
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
