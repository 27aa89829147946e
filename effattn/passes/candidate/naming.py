"""Names in a site: symbolic lengths become Nq and Nk, captured tensors and numbers are named by their use.

Sites that compute the same function get the same names, so layers share a kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from effattn.ir import expr
from effattn.ir.attention import CaptureSpec
from effattn.ir.expr import Nk, Nq, b, h, k, q
from effattn.ir.refusal import Why
from effattn.ir.site import Layout
from effattn.passes.candidate.record import Refused, SizeSource
from effattn.passes.graph.provenance import own_name
from effattn.passes.graph.view import GraphView
from effattn.passes.symbolic import CaptureSource


def with_lengths(term, layout: Layout):
    """``term`` with the symbolic lengths of query and key written as Nq and Nk."""
    replaced: dict[Any, Any] = {}
    if isinstance(layout.q_len, sympy.Symbol):
        replaced[layout.q_len] = Nq
    rest = sympy.sympify(layout.k_len)
    for symbol in sorted(rest.free_symbols, key=str):
        if symbol not in replaced and rest.coeff(symbol) == 1 and not (rest - symbol).has(symbol):
            replaced[symbol] = Nk - (rest - symbol).subs(replaced)
            break
    if not replaced:
        return term
    return sympy.sympify(term).subs(replaced, simultaneous=True)


def in_lengths(layout: Layout) -> Layout:
    """The layout with its lengths in the same symbols as score and predicate."""
    return replace(layout, q_len=with_lengths(layout.q_len, layout), k_len=with_lengths(layout.k_len, layout))


def _is_number(symbol) -> bool:
    return symbol not in (*expr.INDICES, expr.s, Nq, Nk) and symbol.is_integer is not True


def scalars_of(view: GraphView, end: int, score, predicate) -> list[tuple[Any, SizeSource]]:
    """Integers that are known at run time, and where a node at ``end`` finds them."""
    known = (*expr.INDICES, expr.s, Nq, Nk)
    wanted = [x for x in expr.free_symbols(score, predicate) if x not in known and not _is_number(x)]
    wanted = sorted(wanted, key=str)
    return [(symbol, size_source(view, symbol, end)) for symbol in wanted]


def size_source(view: GraphView, symbol, end: int) -> SizeSource:
    """The source of ``symbol`` for a node at ``end``. Raises Refused if there is none."""
    for node, time in view.time.items():
        held = view.value(node)
        if time >= end:
            break
        if isinstance(held, torch.SymInt) and held.node.expr == symbol:
            return SizeSource(node)
    for node in view.graph.nodes:
        if node.op == "placeholder" and symbol in view.shape(node):
            return SizeSource(node, view.shape(node).index(symbol))
    raise Refused(Why.SYMBOLIC_LENGTH, f"no node of the graph holds the length {symbol}")


def number_names(score, predicate) -> dict[str, str]:
    """Names of floats known at run time; equal in every layer, so that layers share a kernel."""
    found = sorted(symbol.name for symbol in expr.free_symbols(score, predicate) if _is_number(symbol))
    return {name: "scale" + (str(number + 1) if number else "") for number, name in enumerate(found)}


def capture_names(score, predicate, captures: dict[str, CaptureSource]) -> dict[str, str]:
    """Short names by use: padding, document, offset, slopes, mask, bias."""
    names: dict[str, str] = {}
    for load in expr.loads_of(predicate, score):
        if load.name in names:
            continue
        base = _role(load, predicate)
        taken = set(names.values())
        name = base
        number = 2
        while name in taken:
            name, number = f"{base}{number}", number + 1
        names[load.name] = name
    return names


def own_names(roles: list[str], captures: list[CaptureSource]) -> tuple[str, ...]:
    """User code's names of captured tensors; the name in ``roles`` if there is none or it would mislead."""
    taken: set[str] = {symbol.name for symbol in (*expr.INDICES, expr.s, Nq, Nk)}
    found: list[str] = []
    for role, source in zip(roles, captures, strict=True):
        name = own_name(source.node)
        found.append(role if name in taken or not name else name)
        taken.add(found[-1])
    return tuple(found)


def _role(load: expr.Load, predicate) -> str:
    free = {symbol for symbol in expr.INDICES if load.has(symbol)}
    if not free and isinstance(load, expr.IntLoad):
        return "offset"
    pairs = [part for part in predicate.atoms(sympy.Rel) if sum(x.name == load.name for x in expr.loads_of(part)) > 1]
    if pairs:
        return "document" if isinstance(pairs[0], sympy.Eq) else "positions"
    if not predicate.has(load):
        return "slopes" if free == {h} else "bias"
    if expr.is_of_blocks(load):
        return "blocks"
    if q in free or k in free:
        return "mask" if {q, k} <= free else "padding" if k in free else "rows"
    return "heads" if free == {h} else "lengths" if free == {b} else "offset"


def renamed(term, names: dict[str, str], numbers: dict[str, str]):
    if term is None:
        return None
    swap: dict[Any, Any] = {expr.number(old): expr.number(new) for old, new in numbers.items()}
    term = sympy.sympify(term).xreplace(swap)
    # from the inside, since an index may contain a load
    return term.replace(
        lambda part: isinstance(part, expr.Load),
        lambda part: part.func(sympy.Symbol(names[part.name]), *part.indices),
    )


def capture_spec(view: GraphView, name: str, source: CaptureSource) -> CaptureSpec:
    tensor = view.tensor(source.node)
    assert tensor is not None
    return CaptureSpec(name, str(tensor.dtype).removeprefix("torch."), tensor.dim())
