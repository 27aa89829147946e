"""Passkey retrieval: a five-digit key is hidden in repeated filler and asked for at the end (arXiv 2305.16300)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effattn.errors import EvaluationError

TASK = (
    "There is important information hidden in a lot of text that does not matter. Find it and remember it. "
    "You will be asked about it.\n\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
# A plain continuation, also for chat models: retrieval is measured, not the style of answers. Small models that find
# the key this way fail half of the time in their chat format.
QUESTION = "\n\nWhat is the pass key? The pass key is"
ANSWER_TOKENS = 12  # most tokens of an answer


@dataclass(frozen=True)
class Passkey:
    """One prompt."""

    ids: Tensor  # int64 [1, N]
    key: str


def passkey(tokenizer: Any, length: int, depth: float, trial: int, seed: int = 0) -> Passkey:
    """A prompt that fills, with its answer, almost ``length`` tokens; deterministic.

    Args:
        depth: position of the key in the filler: 0 is the start, 1 the end.

    Raises:
        EvaluationError: ``length`` is too short even without filler.
    """
    key = str(random.Random(f"{seed} {length} {depth} {trial}").randint(10_000, 99_999))
    room = length - ANSWER_TOKENS
    empty = _ids(tokenizer, key, 0, depth)
    if len(empty) > room:
        raise EvaluationError(
            f"a passkey prompt takes {len(empty) + ANSWER_TOKENS} tokens without any filler, more than the length "
            f"{length}; ask for longer texts"
        )
    filler = max(1, (len(_ids(tokenizer, key, 8, depth)) - len(empty)) // 8)
    count = (room - len(empty)) // filler
    ids = _ids(tokenizer, key, count, depth)
    while len(ids) > room:
        count -= 1
        ids = _ids(tokenizer, key, count, depth)
    return Passkey(torch.tensor([ids]), key)


def _ids(tokenizer: Any, key: str, count: int, depth: float) -> list[int]:
    before = round(depth * count)
    text = TASK + FILLER * before + NEEDLE.format(key=key) + FILLER * (count - before) + QUESTION
    return list(tokenizer(text, verbose=False)["input_ids"])


@torch.no_grad()
def answer(
    body: Callable[..., Any],
    head: Callable[[Tensor], Tensor],
    tokenizer: Any,
    prompt: Tensor,
    cache: str = "past_key_values",
) -> str:
    """The greedy continuation of ``prompt``, token by token with a cache.

    Args:
        body: layers that return ``last_hidden_state`` and a cache, for prompt and decode steps.
        head: logits [1, 1, vocabulary] of a hidden state.
        prompt: int64 [1, N].
        cache: the name of the cache in ``body``'s arguments and output.
    """
    end = tokenizer.eos_token_id
    out = body(prompt, use_cache=True)
    made: list[int] = []
    while True:
        token = head(out.last_hidden_state[:, -1:]).argmax(-1)
        made.append(int(token))
        if made[-1] == end or len(made) == ANSWER_TOKENS:
            return tokenizer.decode(made, skip_special_tokens=True)
        out = body(token, use_cache=True, **{cache: getattr(out, cache)})


def retrieved(key: str, text: str) -> bool:
    """Whether the first number in an answer is the key."""
    found = re.search(r"\d+", text)
    return found is not None and found[0] == key
