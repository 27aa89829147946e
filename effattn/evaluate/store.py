"""The folder of an evaluation: every finished piece is written at once, and reused by the same evaluation.

Files are JSON and only parsed. Pieces that are incomplete or belong to another evaluation are measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from effattn.errors import EvaluationError
from effattn.evaluate.records import Record

FORMAT = "effattn evaluation 1"
SETTING, PIECES = "setting.json", "pieces"
RESULTS, PICTURE = "results.json", "picture.png"
LARGEST = 1 << 26  # bytes; larger files are refused

Kind = TypeVar("Kind", bound=Record)


class Store:
    """Finished pieces by name, in memory and, with a folder, on disk."""

    def __init__(self, folder: str | os.PathLike | None, setting: dict[str, Any], say: Callable[[str], None]):
        """Open or create a folder.

        Args:
            setting: everything that results depend on, as JSON values. Pieces of another setting are deleted, and
                ``say`` reports what has changed.

        Raises:
            EvaluationError: the folder cannot be used, or holds files of something else.
        """
        self.folder = None if folder is None else pathlib.Path(folder)
        self.setting, self.say = setting, say
        self.fingerprint = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
        self.found: dict[str, Record] = {}
        self.reused = 0
        if self.folder is not None:
            self._open(self.folder)

    def get(self, name: str, kind: type[Kind]) -> Kind | None:
        """The finished piece of this name, or None."""
        if name not in self.found and self.folder is not None:
            read = self._read(self._path(name), name, kind)
            if read is not None:
                self.found[name] = read
                self.reused += 1
        record = self.found.get(name)
        return record if isinstance(record, kind) else None

    def put(self, name: str, record: Record) -> None:
        """Store a finished piece."""
        self.found[name] = record
        if self.folder is not None:
            head = {"format": FORMAT, "fingerprint": self.fingerprint, "piece": name}
            write_json(self._path(name), {**head, "result": record.model_dump()})

    def _path(self, name: str) -> pathlib.Path:
        assert self.folder is not None
        return self.folder / PIECES / f"{name}.json"

    def _open(self, folder: pathlib.Path) -> None:
        path = folder / SETTING
        try:
            folder.mkdir(parents=True, exist_ok=True)
            present = sorted(entry.name for entry in folder.iterdir())
        except OSError as error:
            raise EvaluationError(f"cannot use the folder {folder}: {error.strerror}; choose another") from error
        if SETTING not in present:
            others = [name for name in present if name != PIECES]
            if others or any((folder / PIECES).glob("*")):
                raise EvaluationError(
                    f"{folder} holds {', '.join([*others, PIECES][:3])} but no {SETTING}: it is no folder of an "
                    "evaluation, and nothing in it was touched; choose another"
                )
            self._begin(path)
            return
        try:
            before = read_json(path)
            if before.get("format") != FORMAT or not isinstance(before.get("setting"), dict):
                raise ValueError("not written by this version of effattn evaluate")
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"{path} cannot be read ({error}), and nothing was touched: delete {folder} to begin anew, or choose "
                "another folder"
            ) from error
        if before["setting"] == json.loads(json.dumps(self.setting)):
            (folder / PIECES).mkdir(exist_ok=True)
            return
        changed = differences(before["setting"], self.setting)
        self.say(f"begins anew in {folder}: what was measured there had another setting ({'; '.join(changed)})")
        for piece in (folder / PIECES).glob("*.json"):
            piece.unlink()
        self._begin(path)

    def _begin(self, path: pathlib.Path) -> None:
        try:
            path.parent.joinpath(PIECES).mkdir(parents=True, exist_ok=True)
            write_json(path, {"format": FORMAT, "fingerprint": self.fingerprint, "setting": self.setting})
        except OSError as error:
            raise EvaluationError(f"cannot write {path}: {error.strerror}; choose another folder") from error

    def _read(self, path: pathlib.Path, name: str, kind: type[Kind]) -> Kind | None:
        try:
            body = read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.say(f"{path.name} cannot be used ({error}): measured again")
            return None
        ours = {"format": FORMAT, "fingerprint": self.fingerprint, "piece": name}
        if any(body.get(key) != value for key, value in ours.items()):
            self.say(f"{path.name} is not of this evaluation: measured again")
            return None
        try:
            return kind.model_validate(body.get("result"))
        except ValidationError as error:
            first = error.errors()[0]
            self.say(f"{path.name} is not a result ({first['loc']}: {first['msg']}): measured again")
            return None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a regular file of at most ``LARGEST`` bytes. Raises OSError or ValueError."""
    mode = path.lstat()
    if not stat.S_ISREG(mode.st_mode):
        raise ValueError("not a regular file")
    if mode.st_size > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MiB")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    return body


def write_json(path: pathlib.Path, body: dict[str, Any]) -> None:
    """Write atomically: an interrupted run leaves no partial file of this name."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """The first few differences between two settings, as text."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: list[str] = []
        for key in sorted({*before, *now}):
            found += differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found if path else found[:4] + (["..."] if len(found) > 4 else [])
    if before == now or (isinstance(now, (list, tuple)) and list(now) == before):
        return []
    return [f"{path}: {_short(before)} -> {_short(now)}"]


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        value = [item["name"] for item in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
