"""``effattn explain``: what the backend does to a model."""

from __future__ import annotations

import contextlib
import pathlib
from enum import StrEnum

import typer

from effattn.cli import Code, fail, paragraphs


class Attention(StrEnum):
    """Attention implementations of transformers."""

    eager = "eager"
    sdpa = "sdpa"


class When(StrEnum):
    """The graph before or after the rewriting."""

    before = "before"
    after = "after"


@paragraphs
def explain(
    model: str = typer.Argument(
        ...,
        metavar="MODEL",
        help="smollm2, a transformers model directory or hub name, or module:function or file.py:function that returns "
        "(model, args, kwargs). The last two import and run that Python code: use them on code you trust.",
    ),
    policy: str = typer.Option("exact", help="Name of a shipped policy, or a .toml file."),
    length: int = typer.Option(512, min=1, help="Tokens of the example input."),
    batch: int = typer.Option(1, min=1, help="Sequences of the example input."),
    attention: Attention | None = typer.Option(
        None, help="Which implementation transformers uses, before effattn replaces it. Default: the model's own."
    ),
    mask: bool = typer.Option(False, "--mask", help="Pass an attention_mask of ones, as a tokenizer returns it."),
    train: bool = typer.Option(False, "--train", help="Explain a training step, with gradients."),
    json_: bool = typer.Option(False, "--json", help="Print the report as JSON."),
    html: pathlib.Path | None = typer.Option(None, dir_okay=False, help="Also write the report as an HTML page."),
    graph: When | None = typer.Option(None, help="Print the FX graph's code before or after the rewrite instead."),
    passes: bool = typer.Option(False, "--passes", help="Print what each pass did to the graph instead."),
    strict: bool = typer.Option(
        False, "--strict", help="Exit with 1 if an attention was left alone or ran eagerly, or a form was refused."
    ),
) -> None:
    """Compile a model, run it once, and report what happened to every attention in it, and why.

    Needs no GPU and no weights: a directory with only a config.json works.

    Examples:

    effattn explain smollm2 --length 512

    effattn explain smollm2 --length 8192 --policy power --html report.html

    effattn explain ./my-model --attention eager --mask

    effattn explain bench.py:build --graph after

    effattn explain smollm2 --passes
    """
    from effattn.cli import models
    from effattn.policy import Policy

    chosen = Policy.of(policy)  # raises before a model is loaded
    with _telling(f"loading {model}"):
        example = models.load(model, length=length, batch=batch, attention=attention and attention.value, mask=mask)
    with _telling(f"compiling and running {type(example.model).__name__} once"):
        report = _report(example, chosen, train, passes)
    for note in example.notes:
        typer.echo(f"note: {note}", err=True)
    if html is not None:
        try:
            report.to_html(html)
        except OSError as error:
            fail(Code.USAGE, f"cannot write {html}: {error.strerror}")
        typer.echo(f"wrote {html}", err=True)
    if json_:
        import json

        typer.echo(json.dumps(report.to_dict(), indent=2, default=str))
    elif passes:
        from effattn.compiler.report.text import render_passes

        typer.echo(render_passes(report))
    elif graph is not None:
        try:
            typer.echo(report.graph(before=graph is When.before))
        except IndexError as error:
            fail(Code.FINDING, str(error))
    else:
        typer.echo(str(report))
    if strict and _problems(report):
        raise typer.Exit(Code.FINDING)


def _report(example, policy, train: bool, trace: bool):
    import torch

    import effattn
    from effattn.errors import EffattnError

    example.model.train(train)
    try:
        with torch.enable_grad() if train else torch.no_grad():
            options = {"options": {"trace": True}} if trace else {}
            return effattn.explain(example.model, *example.args, policy=policy, **options, **example.kwargs)
    except EffattnError:
        raise
    except Exception as error:
        # the model's own code or torch raised, so show their message
        fail(Code.FINDING, f"the model did not run: {type(error).__name__}: {_first_lines(error)}")


def _problems(report) -> bool:
    body = report.to_dict()
    refused = any(not candidate.get("accepted") for site in body["sites"] for candidate in site.get("candidates", ()))
    failed = any(item.get("failure") for item in body.get("graphs", ()))
    left = any(item.get("attention", True) for item in body["missed"]) or bool(body.get("outside"))
    return left or refused or failed or bool(body.get("policy", {}).get("shortcomings"))


def _first_lines(error: BaseException, count: int = 4) -> str:
    return "\n".join(str(error).strip().splitlines()[:count])


@contextlib.contextmanager
def _telling(text: str):
    """Show a status line with a spinner on standard error if it is a terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(escape(text)):
        yield
