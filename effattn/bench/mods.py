"""The masks and scores that can be named, and those of a user's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from effattn.bench.problem import BenchError, Mod, Problem
from effattn.lowering.forms import FORMS

# --- masks ---


def causal(problem: Problem) -> Mod:
    return Mod(lambda b, h, q, k: k <= q, by_batch=False, by_head=False)


def padding(empty: int, problem: Problem) -> Mod:
    """Causal; every sequence begins with padding, the first with ``empty`` tokens, later ones with less."""
    starts = [empty * (problem.batch - i) // problem.batch for i in range(problem.batch)]
    places = torch.arange(problem.tokens, device=problem.device)
    real = places >= torch.tensor(starts, device=problem.device)[:, None]
    return Mod(lambda b, h, q, k: (k <= q) & real[b, k], by_head=False)


def documents(length: int, problem: Problem) -> Mod:
    """Causal within documents of ``length`` tokens, packed into one sequence."""
    document = torch.arange(problem.tokens, device=problem.device).div(length, rounding_mode="floor")
    document = document.expand(problem.batch, -1).contiguous()
    return Mod(lambda b, h, q, k: (k <= q) & (document[b, q] == document[b, k]), by_head=False)


def window(size: int, problem: Problem) -> Mod:
    return Mod(lambda b, h, q, k: (k <= q) & (q - k < size), by_batch=False, by_head=False)


def power(problem: Problem) -> Mod:
    form = FORMS["power"]
    keep = partial(form.reference, form.params())
    return Mod(lambda b, h, q, k: (k <= q) & keep(q, k), by_batch=False, by_head=False)


# --- scores ---


def softcap(cap: float, problem: Problem) -> Mod:
    return Mod(lambda s, b, h, q, k: cap * torch.tanh(s / cap))


def alibi(problem: Problem) -> Mod:
    """Slopes 2**(-8 i / H), as in the paper."""
    steps = torch.arange(1, problem.heads + 1, device=problem.device, dtype=torch.float32)
    slopes = torch.exp2(-8.0 * steps / problem.heads)
    return Mod(lambda s, b, h, q, k: s + slopes[h] * (k - q))


def table(learned: bool, problem: Problem) -> Mod:
    """A bias for each head and distance, [H, 2N - 1]."""
    generator = torch.Generator(problem.device).manual_seed(1)
    last = problem.tokens - 1
    bias = torch.randn(problem.heads, 2 * last + 1, generator=generator, device=problem.device)
    bias.requires_grad_(learned)
    return Mod(lambda s, b, h, q, k: s + bias[h, q - k + last], learned=(bias,) if learned else ())


@dataclass(frozen=True)
class Named:
    """A row of :data:`MASKS` or :data:`SCORES`."""

    make: Callable[..., Mod] | None  # from the number after the colon, if there is one, and the problem
    meaning: str
    number: type[int] | type[float] | None = None  # what follows the colon
    default: float | None = None
    form: str | None = None  # the form of effattn that it is
    causal: bool | None = None


MASKS = {
    "causal": Named(causal, "keys up to the query's own", causal=True),
    "full": Named(None, "every key", causal=False),
    "padding": Named(padding, "causal, after that many tokens of padding", int, 1024),
    "documents": Named(documents, "causal within packed documents of that length", int, 5000),
    "window": Named(window, "causal, the last so many keys", int, 1024),
    "power": Named(power, "effattn's form of this name, with its default parameters", form="power"),
}
SCORES = {
    "none": Named(None, "q . k / sqrt(D)"),
    "softcap": Named(softcap, "cap * tanh(score / cap)", float, 30.0),
    "alibi": Named(alibi, "a slope for each head times the distance"),
    "table": Named(partial(table, False), "a bias for each head and distance"),
    "learned-table": Named(partial(table, True), "the same, with a gradient of the table in the backward"),
}


@dataclass(frozen=True)
class Chosen:
    """A mask or score as it was asked for, for any problem."""

    text: str
    make: Callable[[Problem], Mod | None]
    row: Named | None = None  # None: the user's own code


Loader = Callable[[str], Callable[..., Any]]


def chosen(what: str, text: str, rows: dict[str, Named], load: Loader) -> Chosen:
    """The mask or score (``what``) that ``text`` names: ``window``, ``window:512`` or ``module:function``.

    Args:
        load: the function that ``module:function`` or ``file.py:function`` names.

    Raises:
        BenchError: there is none of this name, or its number is wrong.
    """
    name, _, number = text.partition(":")
    if name not in rows:
        if ":" in text:
            return Chosen(text, partial(_users, load(text), 4 if what == "mask" else 5, what, text))
        raise BenchError(f"unknown {what} {text!r}; allowed: {', '.join(rows)}, module:function, file.py:function")
    row = rows[name]
    if number and row.number is None:
        raise BenchError(f"{what} {name!r} takes no number, got {text!r}")
    if row.make is None:
        return Chosen(text, lambda problem: None, row)
    if row.number is None:
        return Chosen(name, row.make, row)
    try:
        value = row.number(number) if number else row.number(row.default)  # type: ignore[arg-type]
    except ValueError as error:
        raise BenchError(f"{what} {name!r} takes a number, as in {name}:{row.default:g}, got {text!r}") from error
    if not value > 0:
        raise BenchError(f"{what} {name!r} takes a number above 0, got {text!r}")
    return Chosen(f"{name}:{value:g}" if row.number is float else f"{name}:{value}", partial(row.make, value), row)


def _users(function: Callable[..., Any], arguments: int, what: str, text: str, problem: Problem) -> Mod:
    """A user's mod, tried on one pair."""
    takes = f"{text} must take {'score, ' * (arguments == 5)}b, h, q_idx, kv_idx"
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError as error:
        raise BenchError(f"{takes}: {error}") from error
    index = [torch.zeros(1, dtype=torch.int64, device=problem.device) for _ in range(4)]
    score = [torch.zeros(1, device=problem.device)] if arguments == 5 else []
    try:
        found = function(*score, *index)
    except Exception as error:
        raise BenchError(f"{text} failed: {type(error).__name__}: {error}") from error
    wanted = torch.bool if what == "mask" else torch.float32
    if not isinstance(found, torch.Tensor) or found.dtype != wanted:
        kind = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
        raise BenchError(f"{text} must return a tensor of {wanted}, got {kind}")
    return Mod(function)


def fields(mask: Chosen, score: Chosen) -> dict[str, Any]:
    """What a :class:`Problem` says of its mask and score."""
    row = mask.row
    return {
        "mask": mask.text,
        "score": score.text,
        "make_mask": mask.make,
        "make_score": score.make,
        "form": (row.form, {}) if row is not None and row.form is not None else None,
        "causal": None if row is None else row.causal,
    }
