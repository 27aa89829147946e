"""The command ``effattn``."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

from effattn.cli import (
    Code,
    bench_command,
    cache_commands,
    evaluate_command,
    explain_command,
    fail,
    form_commands,
    paragraphs,
    policy_commands,
)


class _Group(TyperGroup):
    """Converts effattn's own errors to a message and an exit code."""

    def invoke(self, ctx):
        from effattn.errors import EffattnError, FormRefused, VerificationError

        try:
            return super().invoke(ctx)
        except (FormRefused, VerificationError) as error:
            fail(Code.FINDING, str(error))
        except EffattnError as error:
            fail(Code.USAGE, str(error))


app = typer.Typer(
    name="effattn",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        import effattn

        typer.echo(f"effattn {effattn.__version__}")
        raise typer.Exit


@app.callback()
@paragraphs
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Show what effattn does to a model's attention, and why.

    In Python, use torch.compile(model, backend="effattn"). These commands show what it does to a model, which forms of
    attention there are, and whether a policy file is valid.

    Start with: effattn explain smollm2 --length 512

    Exit codes: 0 fine, 1 a problem was found, 2 an option, name or file is wrong or a package is missing.
    """


app.command("explain")(explain_command.explain)
app.command("evaluate")(evaluate_command.evaluate)
app.command("bench")(bench_command.bench)
app.command("forms")(form_commands.forms)
app.add_typer(policy_commands.app, name="policy")
app.add_typer(cache_commands.app, name="cache")
app.command("kernels")(cache_commands.kernels)


if __name__ == "__main__":
    app()
