"""``effattn policy``: check, show and list policies."""

from __future__ import annotations

import typer

from effattn.cli import Code, paragraphs

app = typer.Typer(no_args_is_help=True)


@app.callback()
@paragraphs
def policy() -> None:
    """Check, show and list policies.

    A policy is a TOML file that says which forms of attention are allowed where. Without one, effattn computes exactly
    the model's own function.
    """


@app.command("check")
@paragraphs
def check(
    files: list[str] = typer.Argument(..., metavar="FILE...", help="Policy files, or names of shipped policies."),
    layers: int | None = typer.Option(None, min=0, help="Also check layer ranges against a model of this many layers."),
) -> None:
    """Check policy files. Every mistake is reported with its line, the allowed values, and the nearest match.

    Exit code 1 if a file is invalid, 2 if one cannot be read. Nothing in a policy file is ever executed.
    """
    from effattn.errors import PolicyError, PolicyNotFound
    from effattn.policy import Policy

    code = Code.FINE
    for file in files:
        try:
            policy = Policy.of(file)
            if layers is not None:
                policy.check_layers(layers)
        except PolicyError as error:
            code = max(code, Code.USAGE if isinstance(error, PolicyNotFound) else Code.FINDING)
            typer.secho("error: ", fg="red", err=True, nl=False)
            typer.echo(str(error), err=True)
            continue
        forms = sorted({form for rule in policy.rules for form in rule.forms})
        what = f"{len(policy.rules)} rule{'s' if len(policy.rules) != 1 else ''}"
        typer.echo(f"{file}: ok, policy {policy.name!r}, {what}" + (f", forms: {', '.join(forms)}" if forms else ""))
    if code:
        raise typer.Exit(code)


@app.command("show")
@paragraphs
def show(
    name: str = typer.Argument(..., help="The name of a shipped policy, or a file."),
    json_: bool = typer.Option(False, "--json", help="Print JSON, as effattn reads the policy."),
) -> None:
    """Print a policy, for example to start your own.

    Example: effattn policy show power > mine.toml
    """
    import json

    from effattn.policy import Policy
    from effattn.policy.shipped import shipped, shipped_text

    policy = Policy.of(name)
    if json_:
        typer.echo(json.dumps(policy.to_dict(json=True), indent=2, ensure_ascii=False))
    else:
        typer.echo(shipped_text(name) if name in shipped() else policy.to_toml(), nl=False)


@app.command("list")
@paragraphs
def list_() -> None:
    """List the policies that ship with effattn."""
    from rich.console import Console
    from rich.table import Table

    from effattn.policy import Policy
    from effattn.policy.shipped import shipped

    table = Table("Policy", "What it does", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in shipped():
        table.add_row(name, Policy.named(name).description)
    Console(highlight=False).print(table)
