"""A row: one piece of attention code as somebody wrote it, and what the backend must make of it.

A row is run twice. Without gradients every call is verified and lengths are as they are; with gradients batch and
length are symbolic. Each time the output, and the gradient of every input and parameter, must be those of the
untouched code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comparing import assert_close
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from effattn.compiler.backend import effattn
from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.compiler.report.model import Report


@dataclass(frozen=True)
class Row:
    """What is expected of one model: a predicate a site in order, the reason of each softmax that is left alone.

    ``score`` and ``missed`` are parts of what is reported.
    """

    build: Callable[[], Callable]
    inputs: Callable[[], tuple]
    predicate: tuple[str, ...] | str = "true"
    score: str = ""
    missed: tuple[str, ...] = ()
    symbolic: tuple[int, ...] = (0, 1)  # dimensions of the inputs that are symbolic when it trains
    train: bool = True
    name: str = ""
    while_symbolic: tuple[str, ...] | str | None = None  # the predicates with symbolic lengths, where they differ

    def __str__(self) -> str:
        return self.name or getattr(self.build, "__name__", "row")

    @property
    def predicates(self) -> tuple[str, ...]:
        return (self.predicate,) if isinstance(self.predicate, str) else self.predicate


def check(row: Row, train: bool) -> Report:
    """Compile the row's model, hold it against itself, and the report against the row."""
    model = seeded(row.build)
    if isinstance(model, nn.Module):
        model.eval()
    given = seeded(row.inputs)
    if train:
        report = check_gradients(model, given, row.symbolic)
    else:
        report = check_output(model, given)
    predicates = row.while_symbolic if train and row.while_symbolic is not None else row.predicates
    expected = (predicates,) if isinstance(predicates, str) else predicates
    assert [site.predicate for site in report.sites] == list(expected), (report.sites, report.missed)
    for site in report.sites:
        assert row.score in site.score, site.score
        assert site.exact
    left = [missed for missed in report.missed if missed.attention or row.missed]
    assert len(left) == len(row.missed), left
    for reason, missed in zip(row.missed, left, strict=True):
        assert reason in missed.reason, left
    return report


def check_output(model: Callable, given: tuple, **options: Any) -> Report:
    with torch.no_grad():
        expected = copy.deepcopy(model)(*copied(given))
        fast, heard, settings = compiled(model, verify=True, **options)
        with heard as collected:
            assert_close(fast(*copied(given)), expected)
    return collected.report(settings)


def check_gradients(model: Callable, given: tuple, symbolic: tuple[int, ...] = (), **options: Any) -> Report:
    untouched = copy.deepcopy(model)
    fast, heard, settings = compiled(model, **options)
    with heard as collected:
        actual = results(fast, model, given, symbolic)
    assert_close(actual, results(untouched, untouched, given))
    return collected.report(settings)


def compiled(model: Callable, *, verify: bool = False, dynamic: bool | None = None, fullgraph: bool = False, **more):
    """(the compiled model, what listens to its compilation, the options as they were read)."""
    options = {"rest": "eager", "strict": True, "verify": verify, **more}
    torch._dynamo.reset()
    fast = torch.compile(
        model,
        backend=lambda gm, inputs: effattn(gm, inputs, options=options),
        dynamic=dynamic,
        fullgraph=fullgraph,
    )
    return fast, collect.listening(), Options.read(options)


def results(run: Callable, model: Callable, given: tuple, symbolic: tuple[int, ...] = ()) -> dict[str, Any]:
    """Output of ``run``, and the gradients of everything that can have one."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    for parameter in parameters:
        parameter.grad = None
    given = copied(given, requires_grad=True)
    for leaf in tree_leaves(given):
        for dim in symbolic if isinstance(leaf, Tensor) else ():
            if dim < leaf.dim() and leaf.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(leaf, dim)
    out = run(*given)
    total = sum((weighted(leaf) for leaf in tree_leaves(out) if differentiable(leaf)), torch.zeros(()))
    if total.requires_grad:
        total.backward()
    inputs = [leaf.grad for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return {"output": out, "inputs": inputs, "parameters": [parameter.grad for parameter in parameters]}


def weighted(out: Tensor) -> Tensor:
    """A sum in which every element counts differently."""
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


def differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def copied(given: tuple, requires_grad: bool = False) -> tuple:
    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return copy.copy(leaf)
        leaf = leaf.detach().clone()
        return leaf.requires_grad_() if requires_grad and leaf.is_floating_point() else leaf

    return tree_map(one, given)


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def tokens(*shape: int) -> Callable[[], tuple]:
    """Inputs of a row: one float tensor for each shape."""
    sizes = shape or (2, 13, 32)
    return lambda: (torch.randn(*sizes),)
