"""The text for errors and perplexity, as token ids."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effattn.errors import EvaluationError
from effattn.models import standard_library_text


@dataclass(frozen=True)
class LongText:
    """Token ids and where they come from."""

    ids: Tensor  # int64 [1, tokens]
    source: str
    first: tuple[int, ...] = ()  # ids at the start of every sequence of this model, such as BOS

    def segment(self, length: int, number: int = 0) -> Tensor:
        """The ``number``-th text of ``length`` tokens, int64 [1, length], including ``first``."""
        own = length - len(self.first)
        begun = torch.tensor([self.first], dtype=torch.int64, device=self.ids.device)
        return torch.cat([begun, self.ids[:, number * own : (number + 1) * own]], dim=1)

    def to_dict(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.ids.cpu().numpy().tobytes()).hexdigest()[:16]
        return {"source": self.source, "tokens": self.ids.shape[1], "sha256": digest, "first": list(self.first)}


def long_text(text: str | os.PathLike | Tensor | None, tokenizer: Any, tokens: int, vocabulary: int) -> LongText:
    """A text of at least ``tokens`` tokens.

    Args:
        text: a UTF-8 file, token ids int64 [1, N], or None for the source of Python's standard library.
        tokenizer: of the model; may be None if ``text`` is token ids.
        vocabulary: upper bound of ids, exclusive.

    Raises:
        EvaluationError: the file is missing, not UTF-8 or too short, or there is no tokenizer.
    """
    if isinstance(text, Tensor):
        if text.ndim != 2 or text.shape[0] != 1 or text.is_floating_point():
            raise EvaluationError(f"token ids must be whole numbers [1, N], got {text.dtype} {list(text.shape)}")
        if text.numel() and not 0 <= int(text.min()) <= int(text.max()) < vocabulary:
            raise EvaluationError(f"token ids must be from 0 to {vocabulary - 1}, the vocabulary of the model")
        return _long_enough(LongText(text[:, :tokens].cpu().long(), "token ids"), tokens)
    if tokenizer is None:
        raise EvaluationError("this model comes without a tokenizer; pass text as token ids, an int64 tensor [1, N]")
    first = _beginning(tokenizer)
    if text is None:
        try:
            ids = standard_library_text(tokenizer, tokens)
        except ValueError as error:
            raise EvaluationError(f"{error}; give a longer text of your own (--text FILE)") from error
        return LongText(ids, f"source of the standard library of Python {platform.python_version()}", first)
    path = pathlib.Path(text)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise EvaluationError(f"cannot read the text {path}: {error.strerror}") from error
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    return _long_enough(LongText(torch.tensor([ids], dtype=torch.int64), path.name, first), tokens)


def _long_enough(text: LongText, tokens: int) -> LongText:
    have = text.ids.shape[1]
    if have < tokens:
        raise EvaluationError(
            f"the text ({text.source}) has {have:,} tokens, and lengths times segments ask for {tokens:,}: give a "
            "longer text or ask for less"
        )
    return text


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer puts at the start of every text, such as BOS."""
    ids = tokenizer("")["input_ids"]
    bos = getattr(tokenizer, "bos_token_id", None)
    return (bos,) if bos is not None and list(ids[:1]) == [bos] else ()
