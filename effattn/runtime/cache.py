"""The files that effattn keeps on disk: the source of each generated kernel, for people and profilers to read.

The directory is the user's own (0700). One that belongs to somebody else, or that others may write to, is not used:
everything then stays in memory. Nothing that is read from here is ever executed: whoever runs a kernel compiles the
text that it holds, and the file is only made to agree with it.
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

HEADER = "# effattn kernel"  # the first line of every generated source starts with this
KERNELS = "kernels"
_TEMPORARY = ".effattn-"  # prefix of files that are being written
_HEADER_BYTES = 4096
_FACT = re.compile(r"# (\w+) {2,}(.*)")  # "# predicate  k <= q"
_STALE = 3600.0  # seconds after which such a file belongs to a writer that died


@dataclass(frozen=True)
class Entry:
    """One file in the cache."""

    name: str
    path: pathlib.Path
    size: int  # bytes
    age: float  # seconds since it was written
    ours: bool  # a regular file that carries our header


def directory() -> pathlib.Path:
    """Where the cache is, whether or not it exists: EFFATTN_CACHE_DIR, else the platform's cache directory.

    Raises:
        OptionError: EFFATTN_CACHE_DIR is not a path.
    """
    chosen = settings.current().cache_dir
    return chosen if chosen is not None else pathlib.Path(platformdirs.user_cache_dir("effattn", appauthor=False))


def problem() -> str | None:
    """Why the cache directory must not be used; None if it may, or does not exist yet."""
    root = directory()
    return _unsafe(root) or _unsafe(root / KERNELS)


def keep_source(file_name: str, source: str) -> pathlib.Path:
    """Make sure that ``<cache>/kernels/<file_name>`` holds exactly ``source``, and return that path.

    Safe with many processes: a reader sees the old file or the new one, never a part. A file of that name with any
    other content is replaced, a symbolic link is replaced and never followed. When the directory cannot be written or
    is not safe, a warning says so once and the path is returned all the same: the caller holds the text. Python's
    ``linecache`` is given that text for the path, so ``inspect.getsource`` and tracebacks do not read the disk either.

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
    """Every file in the kernel directory, by name; none if the directory is missing or not safe to use."""
    folder = directory() / KERNELS
    if problem() is not None:
        return ()
    now = time.time()
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        for item in items:
            with contextlib.suppress(OSError):  # deleted while we look
                status = item.stat(follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode):
                    path = folder / item.name
                    age = max(0.0, now - status.st_mtime)
                    found.append(Entry(item.name, path, status.st_size, age, _is_ours(path)))
    return tuple(sorted(found, key=lambda entry: entry.name))


def source(entry: Entry) -> str:
    """The text of a file of ours, to show to people; empty if it is gone."""
    return (_read(entry.path) or b"").decode("utf-8", errors="replace")


def about(entry: Entry) -> dict[str, str]:
    """What the header of a kernel says about it: ``{"form": "power", "predicate": "k <= q", ...}``."""
    start = (_read(entry.path, limit=_HEADER_BYTES) or b"").decode("utf-8", errors="replace")
    facts: dict[str, str] = {}
    for line in start.splitlines():
        if not line.startswith("#"):
            break
        if (fact := _FACT.fullmatch(line)) is not None:
            facts.setdefault(fact[1], "".join(char if char.isprintable() else "?" for char in fact[2]))
    return facts


def clear() -> int:
    """Delete our files and what dead writers left; leave everything else. Returns how many files went."""
    removed = 0
    for entry in entries():
        abandoned = entry.name.startswith(_TEMPORARY) and entry.age > _STALE
        if entry.ours or abandoned:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)  # removes a link itself, never what it points to
                removed += 1
    return removed


def _check_name(file_name: str) -> None:
    plain = file_name and not file_name.startswith(".") and not set(file_name) & set("/\\\0:")
    if not plain or len(os.fsencode(file_name)) > 200:
        raise ValueError(f"not a plain file name: {file_name!r}")


def _ready(folder: pathlib.Path) -> bool:
    """Create the directories where they are missing; False, with one warning, when they are not safe."""
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
    """What is wrong with a directory of the cache; None if it is the user's own or does not exist yet."""
    try:
        link, status = os.lstat(place), os.stat(place)
    except FileNotFoundError:
        return f"{place} is a link to nothing" if os.path.islink(place) else None
    except OSError as error:
        return f"{place} cannot be looked at ({error.strerror or error})"
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
    # O_NONBLOCK: a named pipe in our place must not make us wait
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.open(path, flags)


def _read(path: pathlib.Path, limit: int | None = None) -> bytes | None:
    """The content of a regular file; None if there is none, or a link or anything else stands there."""
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
