"""``effattn cache`` and ``effattn kernels``: the files on disk."""

from __future__ import annotations

import typer

from effattn.cli import Code, fail, paragraphs

app = typer.Typer()


@app.callback(invoke_without_command=True)
@paragraphs
def cache(ctx: typer.Context) -> None:
    """Show or clear the cache of generated kernels.

    The cache holds the sources of generated kernels, for people and profilers to read. effattn never runs these files;
    it runs the text it has just generated. EFFATTN_CACHE_DIR sets the directory.
    """
    if ctx.invoked_subcommand is not None:
        return
    from effattn.runtime import cache as files

    typer.echo(f"directory  {files.directory()}")
    if (problem := files.problem()) is not None:
        typer.secho(f"not used: {problem}", fg="yellow")
        raise typer.Exit(Code.FINDING)
    entries = files.entries()
    ours = [entry for entry in entries if entry.ours]
    typer.echo(f"kernels    {len(ours)}, {_size(sum(entry.size for entry in ours))}")
    if ours:
        ages = [entry.age for entry in ours]
        typer.echo(f"age        {_age(min(ages))} to {_age(max(ages))}")
    if others := [entry for entry in entries if not entry.ours]:
        typer.echo(f"not ours   {len(others)} files, which clearing leaves alone: {', '.join(_names(others))}")


@app.command("path")
@paragraphs
def path() -> None:
    """Print the cache directory, whether or not it exists."""
    from effattn.runtime import cache as files

    typer.echo(str(files.directory()))


@app.command("clear")
@paragraphs
def clear(
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask for confirmation."),
) -> None:
    """Delete the generated kernels. Other files stay, and links are not followed."""
    from effattn.runtime import cache as files

    if (problem := files.problem()) is not None:
        fail(Code.FINDING, f"not touched: {problem}")
    count = sum(entry.ours for entry in files.entries())
    if count and not yes:
        typer.confirm(f"Delete {count} kernel files in {files.directory()}?", abort=True)
    removed = files.clear()
    typer.echo(f"deleted {removed} file{'s' if removed != 1 else ''}")
    if left := files.entries():
        typer.echo(f"left alone: {', '.join(_names(left))}")


@paragraphs
def kernels(
    name: str | None = typer.Argument(None, help="Print the source of this kernel (any part of its name)."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List the generated kernels on disk, or print one.

    Each is a self-contained Triton file, specialised on the form, the predicate (which keys a query may see), the score
    and the sizes. They are written when a compiled model runs on a GPU.

    Examples: effattn kernels, effattn kernels power
    """
    from effattn.runtime import cache as files

    entries = [entry for entry in files.entries() if entry.ours and (name is None or name in entry.name)]
    if name is not None and not json_:
        if len(entries) != 1:
            found = f"{len(entries)} kernels have it: {', '.join(_names(entries))}" if entries else "no kernel has it"
            fail(Code.USAGE, f"{name!r} in the name: {found}")
        typer.echo(files.source(entries[0]), nl=False)
        return
    records = [(entry, files.about(entry)) for entry in entries]
    if json_:
        import json

        rows = [{"name": e.name, "path": str(e.path), "size": e.size, "age": e.age, "about": a} for e, a in records]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not records:
        typer.echo(f"no kernels in {files.directory()}")
        return
    for entry, about in records:
        typer.secho(entry.name, bold=True, nl=False)
        typer.echo(f"  {_age(entry.age)} old")
        for fact in ("predicate", "score", "tensors"):
            if fact in about:
                typer.echo(f"    {fact:<9} {about[fact]}")


def _names(entries) -> list[str]:
    names = [entry.name if entry.name.isprintable() else repr(entry.name) for entry in entries[:5]]
    return names + (["..."] if len(entries) > 5 else [])


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _age(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
