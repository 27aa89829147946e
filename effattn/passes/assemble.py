"""From a draft to a site: mask split from score, symbolic lengths and loads named, everything checked once more."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from effattn.errors import PlanError
from effattn.ir import expr, wire
from effattn.ir.expr import Nk, Nq, b, h, k, q
from effattn.ir.plan import EmptyRows, LoadSpec
from effattn.ir.site import Layout, Site, Stage
from effattn.passes import masks
from effattn.passes.contraction import contraction
from effattn.passes.draft import Anchors, Draft, Match, Refused, SizeSource, require_fixed
from effattn.passes.graph import GraphView, as_sympy, hint
from effattn.passes.operands import Operand
from effattn.passes.placement import placement
from effattn.passes.reading import LoadSource

_TORCH = os.path.dirname(torch.__file__)
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TERMS = 400  # operations in score and predicate together; more is no mask that a person wrote


def assemble(view: GraphView, draft: Draft, order: int) -> Match:
    """The finished match.

    Raises:
        Refused: the draft cannot be computed by an op; the reason says why.
    """
    _check_recorded(view, draft)
    require_fixed(draft.heads, draft.head_dim, draft.value_dim)
    layout = Layout(
        draft.batch, draft.heads, draft.key.heads_in(view), draft.q_len, draft.k_len, draft.head_dim, draft.value_dim
    )
    _expand_shared(view, draft)
    _check_operands(view, draft, layout)
    try:
        found = masks.split(draft.term)
    except masks.Unclear as unclear:
        raise Refused("score and mask", str(unclear)) from unclear
    score, predicate = _with_lengths(found.score, layout), _with_lengths(found.predicate, layout)
    predicate = masks.simplify(predicate)
    _check_expressions(score, predicate)
    if sympy.count_ops(score) + sympy.count_ops(predicate, visual=False) > MAX_TERMS:
        raise Refused("size", "the expression of score and mask is too large to compute in a kernel")
    scaled_fill = any(_is_huge(number) for number in score.atoms(sympy.Number))
    if scaled_fill and _score_dtype(view, draft) == "float16":
        raise Refused("score and mask", "a fill value is scaled by data in float16, which may make it infinite")
    lengths = _in_lengths(layout)
    position = masks.query_position(predicate, lengths)
    if position is None and predicate == sympy.true and layout.q_len == 1 and _appended(view, draft.key):
        position = q + Nk - 1  # a decode step without a mask: the query is the last of the keys
    if draft.scores is not None and view.held(draft.scores.node).dtype in (torch.float16, torch.bfloat16):
        shown = sympy.And(*masks.not_lowered(score))
        if shown != sympy.true and not masks.every_row_sees_a_key(masks.simplify(shown), lengths):
            raise Refused(
                "rows without keys",
                "a row may attend to nothing, and a large number that is added in half precision takes its digits",
                "fill with -inf, or add in float32",
            )
    dtype = _score_dtype(view, draft)
    try:
        empty = masks.empty_rows(
            masks.Split(score, predicate, found.fills),
            lengths,
            sdpa=draft.zero_when_empty,
            dtype=dtype,
            data=_masks_that_are_data(view, score, draft.reader.loads),
        )
    except masks.Unclear as unclear:
        nothing: EmptyRows = "zero" if draft.zero_when_empty else "nan"
        if draft.zeroed or not masks.may_stay_in_score(found, draft.term, dtype):
            raise Refused("rows without keys", str(unclear), "use a boolean mask with SDPA") from unclear
        score, predicate, position, empty = _with_lengths(draft.term, layout), sympy.true, None, nothing
        draft.notes.append("a row may attend to nothing: the mask's fill values are added as the author adds them")

    if draft.nan_when_empty and empty == "mean":
        empty = "nan"
    for where in draft.zeroed:
        where = masks.simplify(_with_lengths(where, layout))
        if masks.simplify(sympy.Not(where)) != predicate:
            raise Refused("weights", "weights are set to zero by another mask than that of the scores")
        empty = "zero"
    if draft.sink is not None:
        empty = "zero"  # the sink takes all of the weight
    _check_gradients(view, draft)
    names = _load_names(score, predicate, draft.reader.loads)
    numbers = _number_names(score, predicate)
    score, predicate, position = (_renamed(term, names, numbers) for term in (score, predicate, position))
    sources = {names[old]: source for old, source in draft.reader.loads.items() if old in names}
    used = [load.name for load in expr.loads_of(score, predicate)]
    used = list(dict.fromkeys(used))
    specs = tuple(_load_spec(view, name, sources[name]) for name in used)
    devices = {name: getattr(view.tensor(sources[name].node), "device", None) for name in used}
    for name, device in devices.items():  # a 0-d tensor may stand on the CPU: PyTorch takes it there, a kernel cannot
        if device != getattr(view.tensor(draft.query.node), "device", None):
            raise Refused("device", f"{name} ({sources[name].node.name}) is on another device than the query")
    scalars = _scalars(view, draft, score, predicate)
    if unknown := set(numbers) - set(draft.reader.numbers):
        raise Refused("symbolic number", f"no node of the graph holds {', '.join(sorted(unknown))}")
    place = placement(draft.out_index, layout.heads, layout.q_len)
    if place is None:
        raise Refused("output layout", f"the order of the output's dimensions is not understood: {draft.out_index}")

    path, classes = module_path(draft.anchor)
    tensor = view.tensor(draft.query.node)
    assert tensor is not None
    loads_need_grad = any(view.held(sources[name].node).requires_grad for name in used)
    needs_grad = view.gradient_flows(view.time[draft.replaced]) and (
        loads_need_grad
        or any(view.held(operand.node).requires_grad for operand in (draft.query, draft.key, draft.value))
    )
    hints = Layout(*(_hint(view, size, draft) for size in vars(layout).values()))
    site = Site(
        name=f"{path or 'attention'}#{order}",
        found_as=draft.found_as,
        stage=_stage(hints, position, needs_grad),
        layout=layout,
        hints=hints,
        score=score,
        predicate=predicate,
        position=position,
        loads=specs,
        scalars=tuple(str(symbol) for symbol, _ in scalars),
        numbers=tuple(numbers.values()),
        empty_rows=empty,
        dtype=_dtype(view, draft),
        device=tensor.device.type,
        needs_grad=needs_grad,
        loads_need_grad=loads_need_grad,
        output_layout=_output_layout(view, draft, place),
        layer=_layer(path),
        module=path,
        module_classes=(*_class_of_self(), *classes),
        location=location(draft.anchor),
        sink=draft.sink is not None,
        notes=tuple(draft.notes),
    )
    anchors = Anchors(
        replaced=draft.replaced,
        anchor=draft.anchor.name,
        scores=draft.scores,
        scores_index=draft.scores_index,
        query=draft.query,
        key=draft.key,
        value=draft.value,
        placement=place,
        loads=tuple(sources[name] for name in used),
        scalars=tuple(source for _, source in scalars),
        numbers=tuple(draft.reader.numbers[name] for name in numbers),
        threshold=found.threshold,
        is_plain_sdpa=draft.is_plain_sdpa,
        is_sdpa=draft.is_sdpa,
        before=draft.before,
        lse=draft.lse,
        sink=draft.sink,
    )
    return Match(site, anchors)


# -- expressions ------------------------------------------------------------------------------------------------


def _check_expressions(score, predicate) -> None:
    if predicate == sympy.false:
        raise Refused("empty mask", "the mask allows nothing at all")
    if predicate.has(expr.s):
        raise Refused("score and mask", "the mask depends on the scores themselves")
    if not score.has(expr.s):
        raise Refused("score and mask", "the scores do not depend on query and key")
    if sympy.count_ops(score) + sympy.count_ops(predicate, visual=False) > MAX_TERMS:
        raise Refused("size", "the expression of score and mask is too large to compute in a kernel")
    for term in (score, predicate):
        try:
            wire.encode(term)
        except PlanError as error:
            raise Refused("score and mask", str(error)) from error


def _score_dtype(view: GraphView, draft: Draft) -> str:
    """The least exact type that scores and masks pass through."""
    nodes = (draft.query.node, draft.anchor.all_input_nodes[0], draft.replaced)
    held = {view.held(node).dtype for node in nodes}
    least = next((dtype for dtype in (torch.float16, torch.bfloat16) if dtype in held), torch.float32)
    return str(least).removeprefix("torch.")


def _masks_that_are_data(view: GraphView, score, loads: dict[str, LoadSource]) -> frozenset[str]:
    """Loads added to the score that may hold -inf or another fill, for each key: a float mask that the caller passes.

    A bias that a layer computes (of relative positions, say) is taken to be finite.
    """
    huge = any(_is_huge(number) for number in score.atoms(sympy.Number))
    found = {load for load in expr.loads_of(score) if load.has(k)}
    return frozenset(load.name for load in found if huge or _may_mask(view, loads[load.name].node))


def _may_mask(view: GraphView, node: fx.Node) -> bool:
    """Whether floats of an input that is no parameter, or a fill, reach ``node`` through arithmetic and views.

    One number alone does not come out of a product of tensors as a mask: it is a scale or a limit of an operand.
    """
    waiting = [(node, False)]
    seen = set(waiting)
    while waiting:
        node, multiplied = waiting.pop()
        tensor = view.tensor(node)
        if node.op == "placeholder" and tensor is not None:
            masks_some = tensor.dim() > 0 or not multiplied
            if tensor.is_floating_point() and masks_some and not isinstance(tensor, torch.nn.Parameter):
                return True
        elif view.call(node) is not None:
            if any(_is_huge(arg) for arg in (*node.args, *node.kwargs.values())):
                return True
            multiplied = multiplied or contraction(view, node) is not None
            new = [(source, multiplied) for source in node.all_input_nodes if (source, multiplied) not in seen]
            seen.update(new)
            waiting += new
    return False


def _is_huge(value: Any) -> bool:
    if isinstance(value, sympy.Number):
        value = float(value)
    return isinstance(value, (int, float)) and (abs(value) >= -masks.FILL or abs(value) == -masks.HALF_FILL)


def _check_gradients(view: GraphView, draft: Draft) -> None:
    """The op's gradient reaches query and key whenever they need one: the author's must do so too."""
    if not view.gradient_flows(view.time[draft.replaced]):
        return
    query, key, value = (view.held(operand.node).requires_grad for operand in (draft.query, draft.key, draft.value))
    stops = (query or key or value) and not view.held(draft.replaced).requires_grad
    weights = view.tensor(draft.anchor)
    if stops or (draft.anchor is not draft.replaced and weights is not None and (query or key) > weights.requires_grad):
        raise Refused("gradient", "the gradient is stopped between query and key and the output (detach or no_grad)")


def _check_recorded(view: GraphView, draft: Draft) -> None:
    """Under vmap, grad and jvp Dynamo records tensors of torch.func, of which an op would see the inside.

    Subclasses of Tensor that hold others inside would each have to say what the op means for them.
    """
    nodes = (draft.replaced, draft.query.node, draft.key.node, draft.value.node)
    leaves = [leaf for node in nodes for leaf in pytree.tree_leaves(view.value(node))]
    for leaf in leaves:
        if is_traceable_wrapper_subclass(leaf):
            raise Refused("subclass", f"its tensors are {type(leaf).__name__}s, a subclass that holds other tensors")
    if any(isinstance(leaf, torch.Tensor) and getattr(leaf, "fake_mode", None) is None for leaf in leaves):
        raise Refused(
            "torch.func", "it runs inside a transformation of torch.func (vmap, grad, jvp)", "not supported yet"
        )


# -- operands ---------------------------------------------------------------------------------------------------


def _expand_shared(view: GraphView, draft: Draft) -> None:
    """Where all batches share a query, key or value, or all heads a query (learned queries), it is expanded: a view."""
    operands = {name: getattr(draft, name) for name in ("query", "key", "value")}
    batch: Any = int(draft.batch) if draft.batch.is_Integer else None
    for operand in operands.values():
        if batch is None and operand.dims[0] is not None:
            batch = (operand.node, operand.dims[0])
    if draft.batch != 1:
        if all(operand.dims[0] is None for operand in operands.values()):
            raise Refused("batch", f"query, key and value are shared by the batch of {draft.batch}")
        shared = {name: operand for name, operand in operands.items() if operand.dims[0] is None}
        for name, operand in shared.items():
            setattr(draft, name, replace(operand, batch=batch))
    if draft.heads != 1 and not draft.query.dims[1]:
        draft.query = replace(draft.query, heads=int(draft.heads))


def _check_lengths(view: GraphView, draft: Draft) -> None:
    """Scores that are put together of several products have more rows or keys than one of them."""
    if draft.scores is None:
        return
    sizes = dict(zip(draft.scores_index, view.held(draft.scores.node).shape, strict=True))
    for name, operand, symbol in (("query", draft.query, q), ("key", draft.key, k), ("value", draft.value, k)):
        rows = view.held(operand.node).shape[operand.dims[2]]
        if hint(rows) != hint(sizes[symbol]):  # symbolic lengths may have several names
            raise Refused("lengths", f"{name} has {rows} rows where the scores have {sizes[symbol]}")


def _check_operands(view: GraphView, draft: Draft, layout: Layout) -> None:
    _check_lengths(view, draft)
    end = view.time[draft.replaced]
    for name, operand in (("query", draft.query), ("key", draft.key), ("value", draft.value)):
        if view.writes_between(operand.node, operand.time - 1, end):
            raise Refused("memory", f"{name} is written between the scores and the output")
        size = layout.batch if operand.dims[0] is None else view.shape(operand.node)[operand.dims[0]]
        if sympy.expand(size - layout.batch) != 0:
            raise Refused("batch", f"{name} has a batch of {size} where the scores have {layout.batch}")
    if draft.query.groups != 1 or (draft.query.dims[1] and draft.query.heads_in(view) != layout.heads):
        raise Refused("heads", "the query has fewer heads than the scores")
    key_heads, value_heads = draft.key.heads_in(view), draft.value.heads_in(view)
    if key_heads != value_heads:
        raise Refused("heads", f"key has {key_heads} heads and value {value_heads}")
    if not (layout.heads.is_Integer and key_heads.is_Integer) or int(layout.heads) % int(key_heads):
        raise Refused("heads", f"{layout.heads} query heads over {key_heads} key heads")
    for operand in (draft.key, draft.value):
        grouped = operand.groups if operand.dims[1] else int(layout.heads)
        if grouped * int(key_heads) != int(layout.heads):
            raise Refused("heads", "query heads do not map to key heads in groups of equal size")
    dtypes = {view.held(operand.node).dtype for operand in (draft.query, draft.key, draft.value)}
    target = view.held(draft.replaced).dtype
    if target not in SUPPORTED_DTYPES:
        raise Refused("dtype", f"attention in {target} is not supported")
    scores = (view.tensor(node) for node in (draft.anchor, *draft.anchor.all_input_nodes[:1]))
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in scores):
        raise Refused("dtype", "the scores are computed in torch.float64, which is not supported")
    if dtypes != {target} and not _autocast(view, draft, target):
        raise Refused("dtype", f"query, key and value mix {', '.join(sorted(map(str, dtypes)))} for a {target} result")
    if not (layout.head_dim.is_Integer and layout.value_dim.is_Integer):
        raise Refused("head_dim", "head_dim is not a constant")
    if any(size == 0 for size in vars(layout).values()):
        raise Refused("empty", "there is nothing to attend to or from: a length is 0")


def _autocast(view: GraphView, draft: Draft, target: torch.dtype) -> bool:
    """Whether the product of query and key already ran in the result's type, as under torch.autocast."""
    return draft.is_sdpa or "autocast" in draft.notes


def _appended(view: GraphView, key: Operand) -> bool:
    """Whether the last row of the keys was just put behind older ones, as a growing cache does."""
    call = view.call(key.node)
    if call is None or call.name != "cat" or not isinstance(call.get("dim", 0), int):
        return False
    parts, dim = call.get("tensors", ()), call.get("dim", 0) % len(view.shape(key.node))
    return len(parts) == 2 and dim == key.dims[2] and view.shape(parts[1])[dim] == 1


def _dtype(view: GraphView, draft: Draft) -> str:
    return str(view.held(draft.replaced).dtype).removeprefix("torch.")


def _output_layout(view: GraphView, draft: Draft, place) -> str:
    """Memory order to write: heads inside rows if that is what the replaced node had, or what its users undo."""
    tensor = view.held(draft.replaced)
    if tensor.dim() == 4 and place.is_identity:
        if (anchor := view.call(draft.anchor)) is not None and anchor.name != "softmax":
            heads, rows = tensor.stride()[1:3]
            return "bnhd" if hint(heads) < hint(rows) else "bhnd"
        calls = [view.call(user) for user in draft.replaced.users]
        if calls and all(call is not None and call.name in ("transpose", "permute") for call in calls):
            return "bnhd"
    return "bhnd"


# -- symbolic lengths, loads --------------------------------------------------------------------------------------


def _with_lengths(term, layout: Layout):
    """Graph symbols that are the lengths of query and key written as Nq and Nk."""
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


def _in_lengths(layout: Layout) -> Layout:
    """The layout with its lengths in the same symbols as score and predicate."""
    return replace(layout, q_len=_with_lengths(layout.q_len, layout), k_len=_with_lengths(layout.k_len, layout))


def _is_number(symbol) -> bool:
    return symbol not in (*expr.INDICES, expr.s, Nq, Nk) and symbol.is_integer is not True


def _scalars(view: GraphView, draft: Draft, score, predicate) -> list[tuple[Any, SizeSource]]:
    known = (*expr.INDICES, expr.s, Nq, Nk)
    wanted = [x for x in expr.free_symbols(score, predicate) if x not in known and not _is_number(x)]
    wanted = sorted(wanted, key=str)
    return [(symbol, _size_source(view, symbol, view.time[draft.replaced])) for symbol in wanted]


def _size_source(view: GraphView, symbol, end: int) -> SizeSource:
    for node, time in view.time.items():
        held = view.value(node)
        if time >= end:
            break
        if isinstance(held, torch.SymInt) and held.node.expr == symbol:
            return SizeSource(node)
    for node in view.graph.nodes:
        if node.op == "placeholder" and symbol in view.shape(node):
            return SizeSource(node, view.shape(node).index(symbol))
    raise Refused("symbolic length", f"no node of the graph holds the length {symbol}")


def _number_names(score, predicate) -> dict[str, str]:
    """Names of floats known at run time, the same in every layer so that layers share one kernel."""
    found = sorted(symbol.name for symbol in expr.free_symbols(score, predicate) if _is_number(symbol))
    return {name: "scale" + (str(number + 1) if number else "") for number, name in enumerate(found)}


def _load_names(score, predicate, loads: dict[str, LoadSource]) -> dict[str, str]:
    """Short names by what a load is used for: padding, document, offset, slopes, mask, bias."""
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


def _role(load: expr.Load, predicate) -> str:
    free = {symbol for symbol in expr.INDICES if load.has(symbol)}
    if not free and isinstance(load, expr.IntLoad):
        return "offset"
    pairs = [part for part in predicate.atoms(sympy.Rel) if sum(x.name == load.name for x in expr.loads_of(part)) > 1]
    if pairs:
        return "document" if isinstance(pairs[0], sympy.Eq) else "positions"
    if not predicate.has(load):
        return "slopes" if free == {h} else "bias"
    if q in free or k in free:
        return "mask" if {q, k} <= free else "padding" if k in free else "rows"
    return "heads" if free == {h} else "lengths" if free == {b} else "offset"


def _renamed(term, names: dict[str, str], numbers: dict[str, str]):
    if term is None:
        return None
    swap: dict[Any, Any] = {
        load: load.func(sympy.Symbol(names[load.name]), *load.indices) for load in expr.loads_of(term)
    }
    swap |= {expr.number(old): expr.number(new) for old, new in numbers.items()}
    return sympy.sympify(term).xreplace(swap) if swap else term


def _load_spec(view: GraphView, name: str, source: LoadSource) -> LoadSpec:
    tensor = view.tensor(source.node)
    assert tensor is not None
    return LoadSpec(name, str(tensor.dtype).removeprefix("torch."), tensor.dim())


# -- names and places -------------------------------------------------------------------------------------------


def module_path(node: fx.Node) -> tuple[str, tuple[str, ...]]:
    """(dotted path of the innermost module, class names outermost first) from what Dynamo recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return "", ()
    path = str(entries[-1][0])
    path = re.sub(r"getattr\((.*?), '(\w+)'\)", r"\1.\2", path)
    path = re.sub(r"\['(\w+)'\]", r".\1", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    path = re.sub(r"(_modules|_parameters)\.", "", path)
    path = re.sub(r"^L\.?(self\.?)?", "", path).strip(".")
    classes = tuple(getattr(entry[1], "__name__", str(entry[1]).rsplit(".", 1)[-1]) for entry in entries)
    return path, classes


def _class_of_self() -> tuple[str, ...]:
    """The class of the module that is compiled: what Dynamo records of nodes begins below it. (): it is unknown."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # takes a second to import

    try:
        owner = InstructionTranslator.current_tx().f_locals.get("self")
    except AttributeError:  # nothing is being compiled, or Dynamo keeps it elsewhere
        return ()
    return (type(owner).__name__,) if isinstance(owner, torch.nn.Module) else ()


def _layer(path: str) -> int | None:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[-1]) if numbers else None


def location(node: fx.Node) -> str:
    """file:line of the user's code that made the node."""
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""


def _stage(hints: Layout, position, needs_grad: bool) -> Stage:
    if needs_grad:
        return "train"
    if hints.q_len == 1 and hints.k_len > 1:
        return "decode"
    if position is not None:
        return "prefill"
    return "cross" if hints.q_len != hints.k_len else "encoder"


def _hint(view: GraphView, size, draft: Draft) -> int:
    size = sympy.sympify(size)
    if size.is_Integer:
        return int(size)
    for operand in (draft.query, draft.key, draft.value):
        for extent in view.held(operand.node).shape:
            if isinstance(extent, torch.SymInt) and as_sympy(extent) == size:
                return hint(extent)
    return 0


__all__ = ["assemble", "b", "location", "module_path"]
