"""``effattn evaluate``: quality and speed of policies on a real model and real text."""

from __future__ import annotations

import pathlib
from enum import StrEnum
from typing import Any

import typer

from effattn.cli import paragraphs


class Rest(StrEnum):
    """What compiles the rest of the graph."""

    inductor = "inductor"
    eager = "eager"


class Dtype(StrEnum):
    """Dtype of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@paragraphs
def evaluate(
    model: str = typer.Option("smollm2", help="smollm2, a transformers model directory or a hub name."),
    policies: str = typer.Option("exact,power,window", help="Shipped policies and .toml files, separated by commas."),
    lengths: str = typer.Option("2048", help="Tokens, by commas: 2048,4096 or 2K,4K."),
    tasks: str = typer.Option("errors,perplexity,passkey,time", help="Which of these to run, separated by commas."),
    depths: str = typer.Option("0.1,0.5,0.9", help="Positions of passkeys: 0 is the start, 1 the end of the text."),
    trials: int = typer.Option(5, min=1, help="Passkeys per length and depth."),
    segments: int = typer.Option(1, min=1, help="Texts per length for perplexity."),
    repeats: int = typer.Option(2, min=0, help="Timed forwards after the first."),
    text: pathlib.Path | None = typer.Option(
        None, dir_okay=False, help="A UTF-8 text file. Default: the source of Python's standard library."
    ),
    rope_scaling: str | None = typer.Option(
        None, metavar="KIND:FACTOR", help="For lengths beyond the model's context: yarn:16, dynamic:4, linear:2."
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1. Default: cuda if there is a GPU."),
    dtype: Dtype | None = typer.Option(None, help="Dtype of the weights. Default: bfloat16 on a GPU, else float32."),
    rest: Rest | None = typer.Option(None, help="What compiles the rest. Default: inductor on a GPU, else eager."),
    seed: int = typer.Option(0, min=0, help="Seed of the passkeys."),
    out: pathlib.Path = typer.Option(
        pathlib.Path("evaluation"), file_okay=False, help="Folder for results; the same command again resumes there."
    ),
    json_: bool = typer.Option(False, "--json", help="Print all results as JSON instead of tables."),
) -> None:
    """Compare policies with the dense model.

    Measures, for every attention, the error of the output and the softmax mass on kept keys, next to the most mass that
    as many blocks can have; perplexity on long text; retrieval of a hidden passkey; and the time of a forward. Prints
    an estimate of the time first, and writes every finished piece at once: after Ctrl-C the same command resumes.

    Examples:

    effattn evaluate --lengths 2K,4K --tasks errors,perplexity

    effattn evaluate --policies power,mine.toml --lengths 32K --rope-scaling yarn:4 --device cuda

    effattn evaluate --tasks passkey --lengths 1K,2K --depths 0,0.25,0.5,0.75,1 --trials 10
    """
    from effattn.cli.arguments import device_named, items, tokens_in
    from effattn.errors import EvaluationError
    from effattn.evaluate.setting import Setting
    from effattn.lowering.device import device_type

    given: dict[str, Any] = {
        "lengths": tuple(tokens_in(item) for item in items(lengths)),
        "tasks": tuple(items(tasks)),
        "depths": tuple(_depth(item) for item in items(depths)),
        "trials": trials,
        "segments": segments,
        "repeats": repeats,
        "seed": seed,
        "rope_scaling": rope_scaling,
    }
    chosen = Setting.read(items(policies), **given).policies  # raises before a model is loaded
    if text is not None and not text.is_file():
        raise EvaluationError(f"there is no text file {text}")
    place = device_named(device)
    kind = dtype.value if dtype is not None else device_type(place.partition(":")[0]).dtype

    from rich.console import Console

    from effattn.cli import models
    from effattn.evaluate import evaluate as run
    from effattn.evaluate.show.progress import Shown
    from effattn.evaluate.show.tables import heading, rich_tables

    tell = Shown(Console(stderr=True))
    tell.say(f"loading {model}")
    loaded, tokenizer, notes = models.language_model(model, device=place, dtype=kind)
    for note in notes:
        tell.say(f"note: {note}")
    try:
        done = run(
            loaded,
            tokenizer,
            chosen,
            **given,
            text=text,
            rest=rest.value if rest is not None else None,
            out=out,
            name=model,
            progress=tell,
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on from what is in {out}", err=True)
        raise typer.Exit(130) from None
    if json_:
        import json

        typer.echo(json.dumps(done.to_dict(), indent=1))
        return
    console = Console(highlight=False)
    console.print(heading(done), markup=False)
    for table in rich_tables(done):
        console.print()
        console.print(table)


def _depth(text: str) -> float:
    from effattn.errors import EvaluationError

    try:
        return float(text)
    except ValueError:
        raise EvaluationError(f"depths are numbers from 0 to 1, got {text!r}") from None
