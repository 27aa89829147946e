"""Lightning attention as a loop over blocks (MiniMax in transformers), matched as one site.

:mod:`effattn.passes.match.blocks` finds which tensors are multiplied. Here the blocks must cover all tokens in order,
and the state must decay by ``exp(rate * tokens)`` from block to block, which gives the rate. The other factors are
tables of data. The rewriting and every call validate that they hold the powers of that rate
(:mod:`effattn.runtime.ops.decay_tables`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from effattn.ir.expr import Where, b, h, k, q, s
from effattn.ir.refusal import Why
from effattn.passes.candidate.operands import Operand, depth
from effattn.passes.candidate.record import Candidate, Loop, MatchedNodes, Refused
from effattn.passes.candidate.space import Readers, score_space
from effattn.passes.graph.view import GraphView, as_sympy, hint
from effattn.passes.match.anchors.anchor import Anchor, Start
from effattn.passes.match.blocks import Block, linked, turns_of
from effattn.passes.match.linear_terms import decay_of, interpret
from effattn.passes.symbolic.decay import DecayReader

_FULL = slice(None)


@dataclass(frozen=True)
class _Rate:
    """A state is multiplied by ``exp(factor * slopes * tokens)`` after ``tokens`` tokens."""

    slopes: fx.Node
    factor: Any
    time: int


def joined_turns(view: GraphView, node: fx.Node) -> Start | None:
    """A concatenation of outputs, the last of which is a turn of such a loop."""
    turns = turns_of(view, node)
    if turns is None:
        return None
    tells = frozenset(made for turn in turns if turn is not None for made in turn.made)
    return Start((node, turns), tells)


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal.

    Dynamo guarded the number of blocks when it unrolled the loop, but it does not derive the end of the last block from
    that. Comparing them here adds an equivalent guard, and causes no recompilation.
    """
    if sympy.expand(as_sympy(one) - as_sympy(other)) == 0:
        return True
    return not (isinstance(one, int) and isinstance(other, int)) and bool(guard_or_false(one == other))


def from_turns(view: GraphView, start: tuple[fx.Node, list[Block | None]], readers: Readers) -> Candidate:
    """The candidate of concatenated outputs and the turns that compute them.

    Raises:
        Refused: they are not all tokens in order, or the state does not decay by one rate per head.
    """
    joined, turns = start[0], linked(view, start[1])
    query, key, value = (_whole(view, [getattr(turn, name) for turn in turns], name) for name in _OPERANDS)
    rate = _one_rate(view, turns)
    _check_tables(view, turns)
    made = frozenset(node for turn in turns for node in (turn.made | (turn.update.made if turn.update else set())))
    last = turns[-1].update
    final = None if last is None else last.after
    _check_memory(view, turns, made, rate, joined)
    _check_used_nowhere_else(view, made, joined, final)
    batch, heads, length, head_dim = view.shape(query)
    if view.shape(key) != view.shape(query) or view.shape(value)[:3] != (batch, heads, length):
        raise Refused(Why.SHAPES, f"query {view.shape(query)}, key {view.shape(key)}, value {view.shape(value)}")
    initial = _initial(view, turns[0].before, joined, (batch, heads, head_dim, view.shape(value)[3]))
    needs_grad = _needs_grad(view, (query, key, value, initial), made, joined)
    shape = (batch, heads, length, length)
    space = score_space(view, readers, shape, leading=((b, h), batch, heads), kind=DecayReader)
    slopes = space.reader.as_data(rate.slopes, rate.time).at(_per_head(view, rate.slopes, heads))
    spec = interpret(Where(k <= q, s * sympy.exp(rate.factor * slopes * (q - k)), 0))
    steps = turns[0].rising is None and initial is not None and not needs_grad
    spec = replace(
        spec,
        rate=None if spec.rate is None else decay_of(view, space.reader, spec.rate, view.time[joined]),
        state="stepped" if steps else "carried",
    )
    begin = min(view.time[node] for node in made)
    nodes = MatchedNodes(
        joined,
        joined,
        *(Operand(node, (0, (1,), 2, (3,)), (), 1, sympy.Integer(1), begin) for node in (query, key, value)),
        loop=Loop(initial, final, *_tables(view, turns)),
        products=tuple(made),
    )
    return Candidate(nodes, "linear", space, (b, h, q, depth), linear=spec, notes=(_note(view, turns),))


_OPERANDS = ("query", "key", "value")


def _note(view: GraphView, turns: list[Block]) -> str:
    if turns[0].rising is None:
        return "a loop over tokens, written out" if len(turns) > 1 else "a step after a state"
    size = hint(view.held(turns[0].query).shape[2])
    count = f"{len(turns)} blocks of {size} tokens" if len(turns) > 1 else "one block"
    return f"a loop over {count}; its decay tables are checked against the rate in every call"


# -- tokens ---------------------------------------------------------------------------------------------------------


def _whole(view: GraphView, parts: list[fx.Node], name: str) -> fx.Node:
    """The tensor whose tokens are those of ``parts``, in order."""
    if len(parts) == 1 and _slice(view, parts[0]) is None:
        return parts[0]
    end: Any = 0
    source: fx.Node | None = None
    for part in parts:
        cut = _slice(view, part)
        if cut is None or cut[0] is not (source or cut[0]) or not same_size(cut[1], end):
            raise Refused(Why.BLOCKS, f"the blocks of {name} do not follow one another in one tensor")
        source, _, end = cut
        if not same_size(view.held(part).shape[2], end - cut[1]):
            raise Refused(Why.BLOCKS, f"a block of {name} reaches beyond the end")
    assert source is not None
    if not same_size(view.held(source).shape[2], end):
        raise Refused(Why.BLOCKS, f"the blocks end at token {end} of {view.held(source).shape[2]}")
    return source


def _slice(view: GraphView, node: fx.Node) -> tuple[fx.Node, Any, Any] | None:
    """(tensor, start, stop) if ``node`` is a slice of rows of a tensor [B, H, N, D]."""
    call = view.call(node)
    source = None if call is None else call.get("input")
    if call is None or not isinstance(source, fx.Node) or len(view.shape(source)) != 4:
        return None
    if call.name == "narrow" and call.get("dim") in (2, -2):
        start, length = view.value(call.get("start")), view.value(call.get("length"))
        return (source, start, start + length) if _is_size(start) and _is_size(length) else None
    index = call.get("index")
    if call.name != "getitem" or not isinstance(index, tuple) or index[:2] != (_FULL, _FULL) or len(index) > 4:
        return None
    if index[3:] not in ((), (_FULL,)) or len(index) < 3 or not isinstance(index[2], slice):
        return None
    cut = index[2]
    start = view.value(0 if cut.start is None else cut.start)
    stop = view.held(source).shape[2] if cut.stop is None else view.value(cut.stop)
    plain = cut.step in (None, 1) and _is_size(start) and _is_size(stop)
    return (source, start, stop) if plain and statically_known_true(start >= 0) else None


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


# -- decay ----------------------------------------------------------------------------------------------------------


def _one_rate(view: GraphView, turns: list[Block]) -> _Rate:
    rates = [_rate(view, turn) for turn in turns if turn.update is not None]
    if not rates:
        raise Refused(
            Why.DECAY, "one block alone, without a state after it: its decay is data, of which no rate is known"
        )
    if any((rate.slopes, rate.factor) != (rates[0].slopes, rates[0].factor) for rate in rates):
        raise Refused(Why.DECAY, "the state decays at another rate after one block than after another")
    return replace(rates[0], time=min(rate.time for rate in rates))


def _rate(view: GraphView, turn: Block) -> _Rate:
    """The rate at which a state decays: ``exp(factor * slopes * tokens)``, with one slope per head."""
    assert turn.update is not None
    call = view.call(turn.update.decay)
    if call is None or call.name != "exp":
        raise Refused(Why.DECAY, f"the state is multiplied by {turn.update.decay.name}, which is no exp(rate * tokens)")
    node, factor, time = call.get("input"), sympy.Integer(1), view.time[call.node]
    while (step := view.call(node)) is not None and step.name in ("neg", "mul"):
        tensors = [x for x in (step.get("input"), step.get("other")) if view.tensor(x) is not None]
        written = view.writes(step.node) or view.writes_between(node, view.time[node], time)
        if len(tensors) != 1 or written:
            break
        if step.name == "mul":
            (number,) = (x for x in (step.get("input"), step.get("other")) if x is not tensors[0])
            number = view.value(number)
            if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymInt)):
                break
            factor = factor * as_sympy(number)
        else:
            factor = -factor
        node, time = tensors[0], view.time[step.node]
    per_token = sympy.cancel(factor / view.shape(turn.query)[2])
    if not per_token.is_number or not per_token.is_finite or per_token == 0:
        raise Refused(
            Why.DECAY, f"the state decays by {factor} times its rate after {view.shape(turn.query)[2]} tokens"
        )
    if not view.held(node).is_floating_point():
        raise Refused(Why.DECAY, f"the rate of decay is read from {view.held(node).dtype}")
    return _Rate(node, per_token, time)


def _per_head(view: GraphView, slopes: fx.Node, heads: Any) -> tuple[Any, ...]:
    """The index of a head in slopes that broadcast to states [B, H, F, D]."""
    shape = view.shape(slopes)
    if len(shape) > 4 or any(size != 1 for n, size in enumerate(reversed(shape)) if n != 2):
        raise Refused(Why.DECAY, f"decay is not one number per head: {list(shape)}")
    if len(shape) < 3 or shape[-3] != heads:
        raise Refused(Why.DECAY, f"decay is read from {list(shape)} for {heads} heads")
    return tuple(h if n == len(shape) - 3 else sympy.Integer(0) for n in range(len(shape)))


def _check_tables(view: GraphView, turns: list[Block]) -> None:
    for turn in turns:
        heads, length = view.shape(turn.query)[1:3]
        if any(view.shape(node)[2] != length for node in (turn.key, turn.value)):
            raise Refused(Why.BLOCKS, "a block's queries, keys and values have different lengths")
        falling = None if turn.update is None else turn.update.falling
        for node, last in ((turn.rising, 1), (falling, 1), (turn.triangle, length)):
            if node is None:
                continue
            shape = view.shape(node)
            if shape[-3:] != (heads, length, last) or any(size != 1 for size in shape[:-3]):
                raise Refused(Why.DECAY, f"a decay table is {list(shape)} for {heads} heads and {length} tokens")
            if view.held(node).requires_grad:
                raise Refused(
                    Why.GRADIENT_OF_DECAY, "decay is learned: it needs a gradient, which the op does not compute"
                )


def _tables(view: GraphView, turns: list[Block]) -> tuple[tuple[fx.Node, ...], ...]:
    """The tables that the loop reads, (rising, falling, triangles); equal slices of a table only once."""
    kinds: tuple[dict[Any, fx.Node], ...] = ({}, {}, {})
    for turn in turns:
        falling = None if turn.update is None else turn.update.falling
        for kind, node in zip(kinds, (turn.rising, falling, turn.triangle), strict=True):
            if node is not None:
                call = view.call(node)
                cut = call is not None and call.name == "getitem"
                kind.setdefault((call.get("input"), str(call.get("index"))) if cut else node, node)  # type: ignore[union-attr]
    return tuple(tuple(kind.values()) for kind in kinds)


# -- writes and other uses --------------------------------------------------------------------------------------------


def _initial(view: GraphView, state: fx.Node, joined: fx.Node, shape: tuple) -> fx.Node | None:
    """The state before the first token; None if it is zero."""
    call = view.call(state)
    written = view.writes_between(state, view.time[state], view.time[joined])
    if call is not None and call.name == "zeros" and not written:
        return None
    if view.held(state).dtype != view.held(joined).dtype:
        raise Refused(Why.DTYPE, f"the state is {view.held(state).dtype}, the output {view.held(joined).dtype}")
    if view.shape(state) != shape:
        raise Refused(Why.SHAPES, f"the first state is {list(view.shape(state))}, expected {list(shape)}")
    return state


def _check_memory(view: GraphView, turns: list[Block], made: frozenset[fx.Node], rate: _Rate, joined: fx.Node) -> None:
    """Refuse writes to anything that the loop reads or makes before its outputs are concatenated."""
    end = view.time[joined]
    if any(view.writes(node) for node in (*made, joined)):
        raise Refused(Why.MEMORY, "the loop writes in place")
    start = min(view.time[node] for node in made)
    read = {source for node in made for source in node.all_input_nodes if source not in made}
    for node in read | made:
        if view.changes_itself(node) or view.writes_between(node, min(start, view.time[node]), end):
            raise Refused(Why.MEMORY, f"{node.name} is written while the loop runs")
    if view.writes_between(rate.slopes, rate.time - 1, end):
        raise Refused(Why.MEMORY, "the rate of decay is written while the loop runs")


def _check_used_nowhere_else(view: GraphView, made: frozenset[fx.Node], joined: fx.Node, final: fx.Node | None) -> None:
    for node in made:
        for user in node.users:
            if user in made or user is joined:
                continue
            if node is not final:
                raise Refused(Why.LOOP_OVER_BLOCKS, f"a result inside the loop is used elsewhere (by {user.name})")
            if user in view.time and view.time[user] < view.time[joined]:
                raise Refused(Why.LOOP_OVER_BLOCKS, "the last state is used before all outputs are computed")


def _needs_grad(view: GraphView, read: tuple[fx.Node | None, ...], made: frozenset[fx.Node], joined: fx.Node) -> bool:
    """Whether the output needs a gradient. The op's gradient reaches every input, so user code's must do so too."""
    modes = {view.gradient_flows(view.time[node]) for node in (*made, joined)}
    if len(modes) > 1:
        raise Refused(Why.GRADIENT, "the gradient is stopped inside the loop")
    needs_grad = modes == {True} and any(view.held(node).requires_grad for node in read if node is not None)
    if needs_grad != view.held(joined).requires_grad:
        raise Refused(Why.GRADIENT, "the gradient is stopped between query, key and value and the output")
    return needs_grad


LOOP = Anchor("loop", joined_turns, (from_turns,))
