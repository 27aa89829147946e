"""``effattn bench``: one attention, of any sizes, mask and score, by effattn and by its peers."""

from __future__ import annotations

import pathlib
from enum import StrEnum
from typing import Any

import typer

from effattn.cli import Code, fail, paragraphs


class Dtype(StrEnum):
    """Dtype of query, key and value."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@paragraphs
def bench(
    tokens: str = typer.Option("4096", help="Tokens, by commas: 8192,32768 or 8K,32K."),
    batch: int = typer.Option(1, min=1, help="Sequences."),
    heads: int = typer.Option(32, min=1, help="Query heads."),
    kv_heads: int | None = typer.Option(None, min=1, help="Key/value heads. Default: as many as query heads."),
    head_dim: int = typer.Option(128, min=1, help="Head dimension."),
    dtype: Dtype | None = typer.Option(None, help="Default: bfloat16 on a GPU, else float32."),
    mask: str = typer.Option(
        "causal",
        metavar="MASK",
        help="causal, full, padding:N, documents:N, window:N, power, or your own mask_mod as module:function or "
        "file.py:function, which is imported and run: use it on code you trust.",
    ),
    score: str = typer.Option(
        "none", metavar="SCORE", help="none, softcap:N, alibi, table, learned-table, or your own score_mod."
    ),
    backward: bool = typer.Option(False, "--backward", help="Time the backward too, apart from the forward."),
    peers: str | None = typer.Option(None, help="Which of the peers, separated by commas. Default: all."),
    seconds: float = typer.Option(0.5, min=0.01, help="Of repeated calls for each figure."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1. Default: cuda if there is a GPU."),
    json_: pathlib.Path | None = typer.Option(None, "--json", dir_okay=False, help="Also write the figures as JSON."),
    plot: pathlib.Path | None = typer.Option(None, dir_okay=False, help="Also draw a roofline: an .svg or .html file."),
) -> None:
    """Time one attention by effattn, FlexAttention, SDPA's flash and cuDNN kernels, SDPA and eager code.

    Prints, for every number of tokens, the time, the ratio to effattn's, operations per second over the pairs that the
    mask allows, memory, and how far each result is from effattn's. A peer that cannot compute the mask or score is left
    out, with the reason. Exits with 1 if a result is another one than effattn's, or effattn failed.

    Examples:

    effattn bench --tokens 8K,32K --heads 32 --kv-heads 8 --mask documents:5000 --backward

    effattn bench --mask window:1024 --score softcap:30 --json bench.json --plot roofline.svg

    effattn bench --mask masks.py:my_mask_mod --tokens 2048 --device cpu --heads 4
    """
    from rich.console import Console

    from effattn.bench.problem import BenchError
    from effattn.bench.roofline import draw, kind_of
    from effattn.bench.run import EFFATTN
    from effattn.bench.run import bench as run
    from effattn.bench.show import heading, left_out, tables
    from effattn.evaluate.show.progress import Shown

    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim}
    problems = _problems(tokens, sizes, dtype, device, mask, score)
    asked = _peers(peers)
    if plot is not None:
        kind_of(plot)  # raises before anything is measured
    tell = Shown(Console(stderr=True))
    steps = len(problems) * len(asked) * (2 if backward else 1)
    with tell:
        tell.begin(steps)
        done = run(problems, asked, backward=backward, seconds=seconds, tell=tell.work, done=lambda: tell.done(1))
    console = Console(highlight=False)
    console.print(heading(done), markup=False)
    for table in tables(done):
        console.print()
        console.print(table)
    for peer, reason in left_out(done):
        console.print(f"left out: {peer}, which {reason}", markup=False)
    if json_ is not None:
        import json

        try:
            json_.write_text(json.dumps(done.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise BenchError(f"cannot write {json_}: {error.strerror}") from error
    if plot is not None:
        draw(done, plot)
    bad = [row for row in done.rows if row.wrong or (row.peer == EFFATTN and row.error)]
    if bad:
        named = ", ".join(dict.fromkeys(f"{row.peer} ({row.problem}, {row.direction})" for row in bad))
        fail(Code.FINDING, f"failed, or another result than effattn's: {named}")


def _problems(
    tokens: str, sizes: dict[str, Any], dtype: Dtype | None, device: str | None, mask: str, score: str
) -> list[Any]:
    """A problem for each number of tokens. Raises EffattnError for whatever was spelled wrong."""
    from effattn.bench.mods import MASKS, SCORES, chosen, fields
    from effattn.bench.problem import BenchError, Problem
    from effattn.cli.arguments import device_named, items, tokens_in
    from effattn.cli.user_code import function_named
    from effattn.lowering.device import device_type

    lengths = [tokens_in(item) for item in items(tokens)]
    if not lengths:
        raise BenchError("give a number of tokens, as in --tokens 8K,32K")
    place = device_named(device)
    kind = dtype.value if dtype is not None else device_type(place.partition(":")[0]).dtype
    asked = fields(chosen("mask", mask, MASKS, function_named), chosen("score", score, SCORES, function_named))
    return [Problem(tokens=n, **sizes, dtype=kind, device=place, **asked) for n in dict.fromkeys(lengths)]


def _peers(text: str | None) -> list[Any]:
    from effattn.bench.peers import PEERS
    from effattn.bench.problem import BenchError
    from effattn.cli.arguments import items

    asked = list(PEERS) if text is None else items(text)
    if strange := [name for name in asked if name not in PEERS]:
        raise BenchError(f"unknown peer {strange[0]!r}; allowed: {', '.join(PEERS)}")
    return [PEERS[name] for name in PEERS if name in asked]
