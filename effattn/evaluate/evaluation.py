"""All results of one evaluation. Tables and the picture are views of them."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from effattn.errors import EvaluationError
from effattn.evaluate.records import (
    ErrorsDone,
    Looked,
    PasskeyAnswer,
    PrefillTime,
    Record,
    SiteErrors,
    TextLoss,
)
from effattn.evaluate.results import Results
from effattn.evaluate.show.picture import draw
from effattn.evaluate.show.tables import plain
from effattn.evaluate.store import read_json


class Evaluation(Results):
    """The results of one evaluation, to print, to draw and to keep."""

    @staticmethod
    def of(about: Mapping[str, Any], looked: Looked, records: Iterable[Record]) -> Evaluation:
        """Collect records by kind."""
        kinds: dict[type[Record], list[Any]] = {SiteErrors: [], TextLoss: [], PasskeyAnswer: [], PrefillTime: []}
        for record in records:
            if not isinstance(record, ErrorsDone):
                kinds[type(record)].append(record)
        return Evaluation(
            about=dict(about),
            notes=looked.notes,
            densities=looked.densities,
            sites=kinds[SiteErrors],
            losses=kinds[TextLoss],
            passkeys=kinds[PasskeyAnswer],
            times=kinds[PrefillTime],
        )

    @staticmethod
    def load(path: str | os.PathLike) -> Evaluation:
        """The inverse of :meth:`save`; also reads the results file of an evaluation's folder.

        Raises:
            EvaluationError: the file is missing or has another format version.
        """
        try:
            return Evaluation.model_validate(read_json(pathlib.Path(path)))
        except (OSError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            reason = f"{first['loc']}: {first['msg']}" if first else str(error)
            raise EvaluationError(f"{os.fspath(path)} holds no results of an evaluation ({reason})") from error

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON values."""
        return self.model_dump()

    def save(self, path: str | os.PathLike) -> None:
        """Write the results as JSON."""
        pathlib.Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def picture(self, path: str | os.PathLike) -> str | None:
        """Draw the heat maps as a PNG. Returns None, or the reason why there is no picture."""
        return draw(self, pathlib.Path(path))

    def __str__(self) -> str:
        return plain(self)
