"""``effattn forms``: the forms, their conditions and their parameters."""

from __future__ import annotations

import typer

from effattn.cli import Code, fail, paragraphs


@paragraphs
def forms(
    name: str | None = typer.Argument(None, help="Show only this form, with its parameters and conditions."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List the forms of attention, or show one.

    A form is a way to compute attention. An exact form computes the model's own function. An approximate or trained
    form computes another function, and is used only where a policy names it.

    Examples: effattn forms, effattn forms power
    """
    from effattn.lowering.forms import FORMS
    from effattn.policy.problems import unknown

    if name is not None and name not in FORMS:
        fail(Code.USAGE, unknown("form", name, FORMS))
    chosen = FORMS.values() if name is None else [FORMS[name]]
    if json_:
        import json

        typer.echo(json.dumps([_record(form) for form in chosen], indent=2))
    elif name is None:
        _table(chosen)
    else:
        _detail(FORMS[name])


def _record(form) -> dict:
    return {
        "name": form.name,
        "kind": form.kind,
        "summary": form.summary,
        "source": form.source,
        "conditions": [{"name": str(rule.why), "otherwise": rule.otherwise, "hint": rule.hint} for rule in form.rules],
        "params": _params(form),
    }


def _params(form) -> dict[str, dict]:
    """Name to type, default, limits and description of each parameter."""
    properties = form.params.model_json_schema().get("properties", {})
    limits = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    return {
        name: {
            "type": body.get("type", "any of several"),
            "default": body.get("default"),
            "limits": " ".join(f"{sign} {body[key]}" for key, sign in limits.items() if key in body),
            "description": body.get("description", ""),
        }
        for name, body in properties.items()
    }


def _table(chosen) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("Form", "Kind", "What it computes", "Parameters", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for form in chosen:
        table.add_row(form.name, form.kind, form.summary, ", ".join(form.params.model_fields) or "-")
    Console().print(table)


def _detail(form) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{form.name}[/] ({form.kind}): {form.summary}")
    console.print(f"From: {form.source}", markup=False)
    params = _params(form)
    if params:
        table = Table(
            "Parameter", "Type", "Default", "Limits", "Meaning", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for name, body in params.items():
            table.add_row(name, body["type"], str(body["default"]), body["limits"], body["description"])
        console.print()
        console.print(table)
    if form.rules:
        console.print("\nIt does not apply where")
        for rule in form.rules:
            console.print(f"  - {rule.why}: {rule.otherwise}" + (f"; {rule.hint}" if rule.hint else ""), markup=False)
    if form.kind != "exact":
        from effattn.policy import write

        defaults = {name: body["default"] for name, body in params.items() if body["default"] is not None}
        body = {"forms": [form.name], "params": {form.name: defaults}}
        console.print("\nIn a policy file:\n")
        console.print(write.rule(body), markup=False, soft_wrap=True, end="")
