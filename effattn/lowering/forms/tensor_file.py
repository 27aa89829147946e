"""Tensors of a safetensors file, each checked before it is used. No code from the file is run."""

from __future__ import annotations

import hashlib
import os
import re
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from effattn.errors import WeightsError
from effattn.lowering.device import HOST

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PIECE = 1 << 20  # bytes hashed at a time


class TensorFile:
    """The tensors and metadata of one file."""

    def __init__(self, path: str | Path):
        """Open ``path``. Tensors are read on demand.

        Raises:
            WeightsError: there is no such file, it is not a safetensors file, or safetensors is not installed.
        """
        self.path = Path(path)
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise WeightsError(
                f"{path}: reading weights needs the package safetensors; install effattn[models]"
            ) from error
        if not self.path.is_file():
            raise WeightsError(f"{path}: no such file")
        try:
            self._file = safe_open(self.path, framework="pt", device=HOST)
            self.names = frozenset(self._file.keys())
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a safetensors file ({error})") from error

    def shape(self, name: str, owner: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it. Raises WeightsError if it is missing; ``owner`` needs it."""
        if name not in self.names:
            near = get_close_matches(name, sorted(self.names), 1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise WeightsError(f"{self.path}: no tensor {name!r}, which {owner} needs{hint}")
        return tuple(self._file.get_slice(name).get_shape())

    def get(self, name: str, shape: tuple[int, ...], owner: str) -> Tensor:
        """A tensor on the CPU in the file's dtype.

        Raises:
            WeightsError: it is missing, has the wrong shape or dtype, or is not finite.
        """
        found = self.shape(name, owner)
        if found != shape:
            raise WeightsError(f"{self.path}: {name!r} has shape {list(found)}, {owner} needs {list(shape)}")
        tensor = self._file.get_tensor(name)
        if tensor.dtype not in DTYPES:
            raise WeightsError(f"{self.path}: {name!r} is {tensor.dtype}; allowed are {', '.join(map(str, DTYPES))}")
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{self.path}: {name!r} holds values that are not finite")
        return tensor

    def whole_number(self, name: str, default: int | None, most: int, meaning: str) -> int:
        """An integer from 1 to ``most`` in the metadata. Raises WeightsError if it is missing or invalid."""
        text = self.metadata.get(name)
        if text is None and default is not None:
            return default
        if text is None or not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
            says = "is absent" if text is None else f"is {text[:20]!r}"
            raise WeightsError(f"{self.path}: {name!r} in its metadata {says}; it is {meaning}, from 1 to {most}")
        return int(text)


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal, cached until the file's size, inode or modification time changes.

    Raises:
        WeightsError: the file cannot be read.
    """
    try:
        facts = os.stat(path)
        return _digest(os.fspath(path), facts.st_mtime_ns, facts.st_size, facts.st_ino)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=64)
def _digest(path: str, _changed: int, _size: int, _node: int) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
