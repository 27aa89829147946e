"""The cache directory: the source of each generated kernel, for people and profilers to read.

It is private to the user (0700). A directory that another user owns or may write to is not used, and everything stays
in memory. Nothing read from it is executed: kernels are compiled from the text in memory, and the file is a copy.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import pathlib
import re
import stat
import tempfile
import time
from dataclasses import dataclass

import platformdirs

from effattn import settings

HEADER = "# effattn kernel"  # start of the first line of every generated source
KERNELS = "kernels"
_TEMPORARY = ".effattn-"  # prefix of files that are being written
_HEADER_BYTES = 4096
_FACT = re.compile(r"# (\w+) {2,}(.*)")  # "# predicate  k <= q"
_STALE = 3600.0  # seconds after which the writer of such a file is considered dead


@dataclass(frozen=True)
class Entry:
    """One file of the cache."""

    name: str
    path: pathlib.Path
    size: int  # bytes
    age: float  # seconds since it was written
    ours: bool  # a regular file that starts with HEADER


def directory() -> pathlib.Path:
    """The cache directory, whether or not it exists: EFFATTN_CACHE_DIR, or the platform's cache directory.

    Raises:
        OptionError: EFFATTN_CACHE_DIR is not a path.
    """
    chosen = settings.current().cache_dir
    return chosen if chosen is not None else pathlib.Path(platformdirs.user_cache_dir("effattn", appauthor=False))


def problem() -> str | None:
    """Why the cache directory must not be used; None if it may be, or does not exist yet."""
    root = directory()
    return _unsafe(root) or _unsafe(root / KERNELS)


def keep_source(file_name: str, source: str) -> pathlib.Path:
    """Make ``<cache>/kernels/<file_name>`` hold exactly ``source``, and return its path.

    Safe with many processes: a reader sees the old file or the new one, never a part. Any other file or symbolic link
    of that name is replaced; links are not followed. If the directory cannot be written or is not safe, warn once; the
    path is returned all the same. ``linecache`` gets the source for the path, so ``inspect.getsource`` and tracebacks
    do not read the disk.

    Raises:
        ValueError: ``file_name`` is not a plain file name.
    """
    _check_name(file_name)
    folder = directory() / KERNELS
    path = folder / file_name
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    try:
        if _ready(folder):
            content = source.encode("utf-8")
            if _read(path) != content:
                _write(path, content)
    except OSError as error:
        settings.warn_once(
            f"effattn cannot write its cache {folder} ({error.strerror or error}); generated kernels stay in memory. "
            "Set EFFATTN_CACHE_DIR to a directory of your own to keep them.",
            key=f"cache not writable {folder}",
        )
    return path


def entries() -> tuple[Entry, ...]:
    """Every file in the kernel directory, sorted by name; () if the directory is missing or not safe."""
    folder = directory() / KERNELS
    if problem() is not None:
        return ()
    now = time.time()
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        for item in items:
            with contextlib.suppress(OSError):  # deleted meanwhile
                status = item.stat(follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode):
                    path = folder / item.name
                    age = max(0.0, now - status.st_mtime)
                    found.append(Entry(item.name, path, status.st_size, age, _is_ours(path)))
    return tuple(sorted(found, key=lambda entry: entry.name))


def source(entry: Entry) -> str:
    """The text of a kernel file; empty if it was deleted."""
    return (_read(entry.path) or b"").decode("utf-8", errors="replace")


def about(entry: Entry) -> dict[str, str]:
    """The facts in a kernel's header: ``{"form": "power", "predicate": "k <= q", ...}``."""
    start = (_read(entry.path, limit=_HEADER_BYTES) or b"").decode("utf-8", errors="replace")
    facts: dict[str, str] = {}
    for line in start.splitlines():
        if not line.startswith("#"):
            break
        if (fact := _FACT.fullmatch(line)) is not None:
            facts.setdefault(fact[1], "".join(char if char.isprintable() else "?" for char in fact[2]))
    return facts


def clear() -> int:
    """Delete generated kernels and files that dead writers left, and nothing else. Returns the number of files."""
    removed = 0
    for entry in entries():
        abandoned = entry.name.startswith(_TEMPORARY) and entry.age > _STALE
        if entry.ours or abandoned:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)  # of a link, removes the link
                removed += 1
    return removed


def _check_name(file_name: str) -> None:
    plain = file_name and not file_name.startswith(".") and not set(file_name) & set("/\\\0:")
    if not plain or len(os.fsencode(file_name)) > 200:
        raise ValueError(f"not a plain file name: {file_name!r}")


def _ready(folder: pathlib.Path) -> bool:
    """Create missing directories. Returns False, and warns once, if they are not safe."""
    root = folder.parent
    root.parent.mkdir(parents=True, exist_ok=True)
    for place in (root, folder):
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
        if (reason := _unsafe(place)) is not None:
            settings.warn_once(f"effattn does not use its cache: {reason}. Generated kernels stay in memory.")
            return False
    return True


def _unsafe(place: pathlib.Path) -> str | None:
    """What is wrong with a directory of the cache; None if it belongs to the user or does not exist yet."""
    try:
        link, status = os.lstat(place), os.stat(place)
    except FileNotFoundError:
        return f"{place} is a broken link" if os.path.islink(place) else None
    except OSError as error:
        return f"{place} cannot be inspected ({error.strerror or error})"
    if not stat.S_ISDIR(status.st_mode):
        return f"{place} is not a directory"
    if not hasattr(os, "geteuid"):
        return None  # Windows: a profile directory is the user's own
    if {link.st_uid, status.st_uid} != {os.geteuid()}:
        return f"{place} belongs to another user (id {status.st_uid}); set EFFATTN_CACHE_DIR to a directory of your own"
    if status.st_mode & 0o022:
        return f"{place} can be written to by others (mode {stat.S_IMODE(status.st_mode):o}); run: chmod 700 {place}"
    return None


def _open(path: pathlib.Path) -> int:
    # O_NONBLOCK: opening a named pipe must not block
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.open(path, flags)


def _read(path: pathlib.Path, limit: int | None = None) -> bytes | None:
    """The content of a regular file; None if it is missing, a link or anything else."""
    try:
        descriptor = _open(path)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None
        return file.read() if limit is None else file.read(limit)


def _write(path: pathlib.Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _is_ours(path: pathlib.Path) -> bool:
    start = _read(path, limit=len(HEADER))
    return start is not None and start == HEADER.encode()
