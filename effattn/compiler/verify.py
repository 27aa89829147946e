"""``options={"verify": True}``: on every call the original graph runs too, and results are compared.

At each site, the mask that user code computed is compared with the predicate that was read from it, on up to ``ROWS``
queries per head. If every form is exact, all outputs of the graph are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from effattn.compiler import generators
from effattn.compiler.options import Options
from effattn.compiler.same_dropout import comparable, drop, dropped_alike
from effattn.errors import VerificationError
from effattn.ir import expr
from effattn.ir.site import Op
from effattn.ir.text import text
from effattn.passes.candidate.record import Match
from effattn.passes.compilation import Outcome
from effattn.passes.masks import split as masks
from effattn.runtime.algebra import evaluate
from effattn.versions import flex_scores

ROWS = 128
TOLERANCES = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 4e-2, torch.float16: 8e-3}
ROUNDINGS = 4  # of two scores, by half a unit each


def verified(compiled: Callable, gm: fx.GraphModule, outcome: Outcome, options: Options) -> Callable:
    """``compiled`` with the comparison around it.

    Raises (when called):
        VerificationError: names the site or output, and the difference.
    """
    assert outcome.original is not None
    original = fx.GraphModule(gm, outcome.original)
    checked = original if outcome.canonical is None else fx.GraphModule(gm, outcome.canonical)
    exact = all(choice.exact for choice in outcome.choices) and comparable(outcome.choices)
    devices = generators.devices_of(outcome.original)

    def run(*args: Any) -> Any:
        random = generators.states(devices)
        copies = [_copy(arg) for arg in args]
        checker = _Checker(checked, outcome)
        with torch.no_grad():
            expected = checker.run(*copies)
            if checked is not original and not checker.dropped:
                generators.restore(random)
                expected = original(*[_copy(arg) for arg in args])
        generators.restore(random)
        actual = compiled(*args)
        if exact:
            _compare(expected, actual, checker.tolerance)
        return actual

    return run


def _copy(arg: Any) -> Any:
    return arg if isinstance(arg, torch.nn.Parameter) or not isinstance(arg, torch.Tensor) else arg.detach().clone()


class _Checker(fx.Interpreter):
    """Runs the original graph, and compares each site's mask with its predicate."""

    def __init__(self, original: fx.GraphModule, outcome: Outcome):
        super().__init__(original)
        matches = outcome.matches
        self.sites = {_checked_at(match).name: match for match in matches if match.nodes.loop is None}
        self.by_time: dict[int, list[str]] = {}
        self.values: dict[tuple[str, int], Any] = {}
        self.plain: dict[str, Any] = {}  # lengths and numbers by node, since the interpreter frees unused values
        self.kept = {source.node.name for match in matches for source in match.scalars}
        self.kept |= {node.name for match in matches for node in match.numbers}
        self.dropped = dropped_alike(outcome.choices)
        self.time = 0
        self.tolerance = 0.0  # of outputs, for what rounding may do to the attention behind them
        for match in matches:
            scores = [match.nodes.scores] if match.nodes.scores is not None else []
            for source in (*match.captures, *scores):
                self.by_time.setdefault(source.time, []).append(source.node.name)

    def run_node(self, n: fx.Node) -> Any:
        for name in self.by_time.get(self.time, ()):
            value = next(held for node, held in self.env.items() if node.name == name)
            self.values[name, self.time] = value.detach().clone()
        if n.name in self.sites:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if (sdpa := self._sdpa_arguments(self.sites[n.name])) is not None:
                args, kwargs = (), sdpa
            self._check(self.sites[n.name], n, args, kwargs)
        self.time += 1
        result = self._drop(n, self.dropped[n.name]) if n.name in self.dropped else super().run_node(n)
        if n.name in self.kept:
            self.plain[n.name] = result.shape if isinstance(result, torch.Tensor) else result
        return result

    def _sdpa_arguments(self, match: Match) -> dict[str, Any] | None:
        """The arguments of an SDPA call, by name, since calls differ in form; None for another spelling."""
        if match.nodes.sdpa is None:
            return None
        held = {one.name: value for one, value in self.env.items()}
        return fx.map_arg(dict(match.nodes.sdpa), lambda one: held[one.name])

    def _drop(self, node: fx.Node, match: Match) -> torch.Tensor:
        """The result of a node that drops weights, with those dropped that the op drops."""
        sdpa, scores = self._sdpa_arguments(match), match.nodes.scores
        if sdpa is not None:
            return drop(match, _sizes(match, sdpa["query"], sdpa["key"]), sdpa)
        assert scores is not None
        sizes = _sizes(match, self.values[scores.node.name, scores.time], None)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return drop(match, sizes, args[0] if args else kwargs["input"])

    def _check(self, match: Match, node: fx.Node, args: tuple, kwargs: dict) -> None:
        site = match.site
        query, key = kwargs.get("query"), kwargs.get("key")
        if node.target is torch.ops.higher_order.flex_attention:
            query = flex_scores(*args)
        if (scores := match.nodes.scores) is not None:
            query = self.values[scores.node.name, scores.time]
        theirs = _scores_of_user(match, query, key, kwargs)
        sizes, device = _sizes(match, query, key), theirs.device
        rows = torch.linspace(0, sizes["q"] - 1, min(ROWS, sizes["q"]), device=device).long()
        index = {
            "b": torch.arange(sizes["b"], device=device).view(-1, 1, 1, 1),
            "h": torch.arange(sizes["h"], device=device).view(1, -1, 1, 1),
            "q": rows.view(1, 1, -1, 1),
            "k": torch.arange(sizes["k"], device=device).view(1, 1, 1, -1),
            "Nq": sizes["q"],
            "Nk": sizes["k"],
        }
        captures = {
            spec.name: self.values[source.node.name, source.time]
            for spec, source in zip(site.spec.captures, match.captures, strict=True)
        }
        for name, source in zip(site.spec.scalars, match.scalars, strict=True):
            held = self.plain[source.node.name]
            index[name] = held if source.dim is None else held[source.dim]
        for name, number in zip(site.spec.numbers, match.numbers, strict=True):
            index[name] = self.plain[number.name]
        places = [evaluate(entry, index, captures, torch.float64, device) for entry in match.scores_index]
        places = [torch.as_tensor(place, device=device) for place in places]
        places = [
            torch.zeros_like(place) if size == 1 else place for place, size in zip(places, theirs.shape, strict=True)
        ]
        theirs = theirs[tuple(places)].double()
        read = torch.as_tensor(evaluate(site.spec.predicate, index, captures, torch.float64, device), device=device)
        # an additive mask passed as data may be part of the score instead of the predicate
        added = evaluate(site.spec.score, {**index, "s": 0.0}, captures, torch.float64, device)
        ours = torch.where(read, torch.as_tensor(added, dtype=torch.float64, device=device), -torch.inf)
        theirs, ours = torch.broadcast_tensors(theirs, ours)
        threshold = match.threshold
        if site.op is Op.LINEAR:
            differ = (theirs != 0) & (ours == -torch.inf)  # a weight that is allowed may be 0
        else:
            largest = _largest(theirs, threshold) if match.nodes.sdpa is None else _bound(query, key, kwargs)
            self.tolerance = max(self.tolerance, _tolerance(match, largest))
            # what lies far below other keys has no weight, whether it is a large number or already infinite
            differ = ((theirs > threshold) != (ours > threshold)) & ~(_far_below(theirs) & _far_below(ours))
        if wrong := int(differ.sum()):
            raise VerificationError(
                f"{site.name} ({site.location}): the mask was read as {text(site.spec.predicate)}, "
                f"but {wrong} of {differ.numel()} checked entries differ from the model's own mask"
            )


def _checked_at(match: Match) -> fx.Node:
    """The node before which the scores (or weights without a softmax) have the values that were read."""
    return match.nodes.anchor if match.site.op is Op.SOFTMAX else match.nodes.replaced


def _tolerance(match: Match, largest: float) -> float:
    """What an output may be off by, relative to its largest value, where the scores that count are up to ``largest``.

    User code rounds a score when it is multiplied, scaled, masked and cast, each time by half a unit in its last
    place; a weight is off by as much as the difference of two scores, and the output by as much as a weight.
    """
    nodes = (match.nodes.replaced, *(operand.node for operand in match.nodes.operands.values()))
    dtypes = {node.meta["example_value"].dtype for node in nodes}
    least = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return TOLERANCES[least] + ROUNDINGS * torch.finfo(least).eps * largest


def _largest(scores: torch.Tensor, threshold: float) -> float:
    """The largest absolute value of any row's maximum: smaller scores count only if they are near it."""
    highest = scores.amax(dim=-1)
    highest = highest[highest.isfinite() & (highest > threshold)]
    return highest.abs().max().item() if highest.numel() else 0.0


def _bound(query: Any, key: Any, sdpa: dict) -> float:
    """An upper bound of SDPA's scores, which are not observable, from the norms of query and key."""
    scale = sdpa.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    lengths = [x.detach().double().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1).max().item() for x in (query, key)]
    return scale * lengths[0] * lengths[1]


def _far_below(scores: torch.Tensor) -> torch.Tensor:
    """Scores without weight: below the row's maximum by at least a fill value."""
    return scores - scores.amax(dim=-1, keepdim=True) <= masks.FILL


def _sizes(match: Match, query: Any, key: Any) -> dict[str, int]:
    """The sizes of this call, from the scores, or from query and key."""
    if match.nodes.sdpa is None:
        names, heads = {"b": 1}, int(match.site.layout.heads)
        for entry, size in zip(match.scores_index, query.shape, strict=True):
            together = entry.has(expr.b) and entry != expr.b  # batch and heads are one dimension
            names["b" if together else str(entry)] = int(size) // heads if together else int(size)
        return {"b": names["b"], "h": heads, "q": names["q"], "k": names["k"]}
    lead = query.shape[:-2]
    return {
        "b": int(lead[0]) if lead else 1,
        "h": int(match.site.layout.heads),
        "q": int(query.shape[-2]),
        "k": int(key.shape[-2]),
    }


def _scores_of_user(match: Match, query: Any, key: Any, sdpa: dict) -> torch.Tensor:
    """The user's scores, or the mask that SDPA adds to them, as numbers of the scores' shape."""
    if match.nodes.sdpa is None:
        return query
    mask, causal = sdpa.get("attn_mask"), sdpa.get("is_causal", False)
    shape = (*query.shape[:-1], key.shape[-2])
    scores = torch.zeros(shape[-2:], device=query.device)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.expand(torch.broadcast_shapes(scores.shape, (1,) * len(shape)))


def _compare(expected: Any, actual: Any, tolerance: float) -> None:
    pairs = zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(actual), strict=True)
    for number, (want, got) in enumerate(pairs):
        if not isinstance(want, torch.Tensor) or not want.is_floating_point():
            continue
        want, got = want.double(), got.detach().double()
        if want.numel() == 0:
            continue
        error = (want - got).nan_to_num().abs().max().item()
        own = TOLERANCES.get(actual_dtype(actual, number), 1e-3)
        limit = max(own, tolerance) * max(1.0, want.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
        if not torch.equal(want.isnan(), got.isnan()):
            raise VerificationError(
                f"output {number} of the graph is NaN where the untouched graph is not, or not where it is"
            )
        if error > limit:
            raise VerificationError(
                f"output {number} of the graph differs by {error:.3g} from the untouched graph (limit {limit:.3g})"
            )


def actual_dtype(outputs: Any, number: int) -> torch.dtype:
    return torch.utils._pytree.tree_leaves(outputs)[number].dtype
