"""Linear attention as a loop over blocks of tokens with a state between them, unrolled by Dynamo.

    out_i = ((q_i k_i^T) * D_i) v_i + (q_i * A_i) S_i        S_(i+1) = S_i * b_i + (k_i * E_i)^T v_i

or token by token, ``S_(i+1) = S_i * b + k_i^T v_i`` and ``out_i = q_i S_(i+1)``. The outputs are concatenated. This
module only finds which tensors are multiplied; the values of the factors D, A, E and b are not examined here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from effattn.ir.refusal import Why
from effattn.passes.candidate.record import Refused
from effattn.passes.graph.contraction import contraction
from effattn.passes.graph.view import GraphView
from effattn.passes.symbolic.views import permutation

_SCORES, _WEIGHTED = "bhid,bhjd->bhij", "bhij,bhje->bhie"
_FROM_STATE, _TO_STATE = "bhid,bhde->bhie", "bhjd,bhje->bhde"


@dataclass(frozen=True)
class Update:
    """``after = before * decay + (key * falling)^T value``; ``falling`` is None if key is not scaled."""

    after: fx.Node
    before: fx.Node
    key: fx.Node
    value: fx.Node
    decay: fx.Node
    falling: fx.Node | None
    made: frozenset[fx.Node]  # nodes that compute only this


@dataclass(frozen=True)
class Block:
    """One iteration of the loop. An iteration over a single token reads the state after it and has no tables."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    before: fx.Node  # the state at its start
    rising: fx.Node | None  # A
    triangle: fx.Node | None  # D
    update: Update | None  # None after the last block, if its state is not used
    made: frozenset[fx.Node]


def turns_of(view: GraphView, node: fx.Node) -> list[Block | None] | None:
    """The turns whose outputs ``node`` concatenates (None for outputs of other code), if the last one is a turn."""
    call = view.call(node)
    if call is None or call.name != "cat" or len(view.shape(node)) != 4 or call.get("dim", 0) not in (2, -2):
        return None
    turns = [_turn(view, part) if isinstance(part, fx.Node) else None for part in call.get("tensors", ())]
    return turns if turns and turns[-1] is not None else None


def linked(view: GraphView, turns: list[Block | None]) -> list[Block]:
    """The turns, each with the state that it leaves.

    Raises:
        Refused: a turn does not start from the state that the turn before it leaves.
    """
    found: list[Block] = []
    for number, turn in enumerate(turns):
        which = f"block {number} of {len(turns)}"
        if turn is None:
            raise Refused(Why.LOOP_OVER_BLOCKS, f"{which} is computed in another way than the last one")
        if (turn.rising is None) != (turns[-1].rising is None):  # type: ignore[union-attr]
            raise Refused(Why.LOOP_OVER_BLOCKS, "some tokens come in blocks and others one by one")
        if found and found[-1].update is None:
            found[-1] = replace(found[-1], update=_update(view, turn.before, found[-1]))
        if found and (found[-1].update is None or found[-1].update.after is not turn.before):
            raise Refused(Why.LOOP_OVER_BLOCKS, f"{which} does not start from the state that the one before it leaves")
        found.append(turn)
    last = found[-1]
    if last.update is None:
        states = (state for scaled in last.before.users for state in scaled.users)
        updates = (_update(view, state, last) for state in dict.fromkeys(states))
        found[-1] = replace(last, update=next((update for update in updates if update is not None), None))
    return found


# -- the parts of a turn ------------------------------------------------------------------------------------------


def _turn(view: GraphView, part: fx.Node) -> Block | None:
    if (read := _spells(view, part, _FROM_STATE)) is not None:
        query, state, made = read
        update = _update(view, state, None)
        if update is None:
            return None
        return Block(query, update.key, update.value, update.before, None, None, update, made)
    for inside, before in _both_orders(view, part, "add"):
        weighted, old = _spells(view, inside, _WEIGHTED), _spells(view, before, _FROM_STATE)
        if weighted is None or old is None:
            continue
        weights, value, made = weighted
        scaled, state, more = old
        for scores, triangle in _both_orders(view, weights, "mul"):
            product = _spells(view, scores, _SCORES)
            rising = None if product is None else _factor(view, scaled, product[0])
            if product is None or rising is None:
                continue
            query, key, most = product
            everything = made | more | most | {part, weights, scaled}
            return Block(query, key, value, state, rising, triangle, None, everything)
    return None


def _update(view: GraphView, state: fx.Node, turn: Block | None) -> Update | None:
    """How ``state`` is made from the state before ``turn`` and its keys; ``turn`` None: from any single token."""
    for kept, added in _both_orders(view, state, "add"):
        product = _spells(view, added, _TO_STATE)
        if product is None:
            continue
        key, value, made = product
        made = made | {state, kept}
        if turn is not None:
            decay, falling = _factor(view, kept, turn.before), _factor(view, key, turn.key)
            if decay is not None and falling is not None and value is turn.value:
                return Update(state, turn.before, turn.key, value, decay, falling, made | {key})
            continue
        for before, decay in _both_orders(view, kept, "mul"):
            if view.shape(before) == view.shape(state) != view.shape(decay) and view.shape(key)[2] == 1:
                return Update(state, before, key, value, decay, None, made)
    return None


def _both_orders(view: GraphView, node: fx.Node, name: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operands of a sum or product of two tensors, in both orders."""
    call = view.call(node)
    if call is None or call.name != name or call.get("alpha", 1) != 1 or call.get("out") is not None:
        return
    pair = call.get("input"), call.get("other")
    if all(isinstance(operand, fx.Node) and view.tensor(operand) is not None for operand in pair):
        yield pair
        yield pair[1], pair[0]


def _factor(view: GraphView, product: fx.Node, tensor: fx.Node) -> fx.Node | None:
    """The other factor of ``product`` besides ``tensor``; None if it is not such a product."""
    return next((other for one, other in _both_orders(view, product, "mul") if one is tensor), None)


def _spells(view: GraphView, node: fx.Node, equation: str) -> tuple[fx.Node, fx.Node, frozenset[fx.Node]] | None:
    """(left, right, nodes in between) if ``node`` is the product of two tensors given by ``equation``."""
    product = contraction(view, node)
    if product is None or (call := view.call(node)) is None or call.name == "baddbmm" or call.get("out") is not None:
        return None
    terms, out = equation.split("->")
    sides = terms.split(",")
    for first, second in (("left", "right"), ("right", "left")):
        for left, left_labels, one in _levels(view, *product.operand(first)):
            for right, right_labels, two in _levels(view, *product.operand(second)):
                said = [*zip(sides[0], left_labels, strict=False), *zip(sides[1], right_labels, strict=False)]
                said += zip(out, product.out_labels, strict=False)
                lengths = (len(left_labels), len(right_labels), len(product.out_labels))
                if lengths == (4, 4, 4) and len(set(said)) == len(dict(said)) == len({label for _, label in said}):
                    return left, right, frozenset({node, *one, *two})
    return None


def _levels(view: GraphView, node: fx.Node, labels: tuple[str, ...]) -> Iterator[tuple[fx.Node, tuple[str, ...], Any]]:
    """An operand and what it was before each transpose: (node, labels, transposes in between)."""
    passed: tuple[fx.Node, ...] = ()
    while True:
        yield node, labels, passed
        call = view.call(node)
        source = None if call is None else call.get("input")
        order = None if call is None or not isinstance(source, fx.Node) else permutation(call, len(labels))
        if order is None or view.writes(node):
            return
        before = [""] * len(labels)
        for new, old in enumerate(order):
            before[old] = labels[new]
        passed, node, labels = (*passed, node), source, tuple(before)  # type: ignore[assignment]
