"""The definition of a form, a way to compute a site: parameters, rules, kept keys, cost and reference, all as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import sympy
from pydantic import BaseModel, ConfigDict

from effattn.ir import expr
from effattn.ir.expr import k
from effattn.ir.refusal import Refusal, Why
from effattn.ir.selector import Selector
from effattn.ir.site import Layout, Site
from effattn.lowering.cost import Cost, Work, pairs
from effattn.lowering.iteration.tile_ranges import key_conditions, text_conditions, tile_ranges

Kind = Literal["exact", "approximate", "trained"]


class Params(BaseModel):
    """Parameters of a form, as set in a policy. Unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    files: ClassVar[tuple[str, ...]] = ()  # parameters that are paths; what they mean changes with the file

    def shown(self) -> dict[str, Any]:
        """What a report says of them, and a policy that repeats a choice."""
        return self.model_dump()


@dataclass(frozen=True)
class Rule:
    """One condition of a form on a site. The same row checks and explains."""

    why: Why
    holds: Callable[[Site, Any], bool]
    otherwise: str  # the reason for refusing if it does not hold
    hint: str = ""  # what would help
    reason: Callable[[Site, Any], str | None] | None = None  # a more specific reason for a site

    def refusal(self, site: Site, params: Params) -> Refusal | None:
        if self.holds(site, params):
            return None
        return self.because(None if self.reason is None else self.reason(site, params))

    def because(self, reason: str | None = None) -> Refusal:
        """The refusal of a site that fails this condition."""
        return Refusal(self.why, reason or self.otherwise, self.hint)


@dataclass(frozen=True)
class Form:
    """A way to compute a site: softmax attention over some keys, given by ``keep`` or chosen by ``select``.

    ``reference`` is the eager definition of the kept keys, without causality. Without a selector, its arguments are
    (params, q_index [Nq, 1], k_index [1, Nk]) and it returns bool [Nq, Nk]. With one, they are (params, query
    [B, Hq, Nq, D], key [B, Hkv, Nk, D], allowed bool that broadcasts to [B, Hq, Nq, Nk], scale), with the last query at
    the last key, and it returns bool [B, Hq, Nq, Nk].
    """

    name: str
    kind: Kind
    summary: str
    source: str
    params: type[Params]
    rules: tuple[Rule, ...]
    kept_keys: Callable[[Any], Any]  # params -> keys that a query at position Nk keeps, a sympy term in Nk, for costs
    reference: Callable[..., Any]
    # (params, site) -> predicate in the indices: which allowed keys are kept; see Site.position, first_key
    keep: Callable[[Any, Site], Any] = lambda params, site: sympy.true
    select: Callable[[Any, Site], Selector] | None = None  # (params, site) -> selector that chooses keys at run time
    selector_work: Callable[[Any, Layout, int], Work] | None = None  # (params, sizes, bytes per element) -> its cost
    softmax: bool = True  # False: another function with its own op; kept keys do not apply

    def selector(self, params: Params, site: Site) -> Selector | None:
        """The selector of this form at a site; None if it has none.

        Raises:
            WeightsError: the parameters name a file that cannot be read.
        """
        return None if self.select is None else self.select(params, site)

    def refusals(self, site: Site, params: Params) -> tuple[Refusal, ...]:
        """All reasons why this form does not apply to ``site``; () if it does."""
        found = (rule.refusal(site, params) for rule in self.rules)
        return tuple(refusal for refusal in found if refusal is not None)

    def cost(self, site: Site, params: Params) -> Cost:
        """The cost of one call: attention over the kept keys, and the selector."""
        sizes = site.hints
        heads, kv_heads = sizes.batch * sizes.heads, sizes.batch * sizes.kv_heads
        widths, element = sizes.head_dim + sizes.value_dim, 4 if site.dtype == "float32" else 2
        kept = self.kept_keys(params)
        visited = pairs(kept) if site.position is not None else expr.Nq * kept
        read = expr.Nk if self.kind == "exact" else sympy.Min(expr.Nk, expr.Nq + kept)
        attention = Work(2 * heads * widths * visited, element * widths * (heads * expr.Nq + kv_heads * read), 1)
        selector = self.selector_work(params, sizes, element) if self.selector_work else Work()
        return Cost(attention, selector, dense=self.kind == "exact")


def first_key(site: Site) -> Any:
    """The first key of a query's text, for forms with the rule FROM_THE_FIRST_KEY: after padding, of its document."""
    padding, others = key_conditions(_data(site))
    if others != sympy.true:
        return expr.first_key_of_query
    return sympy.Integer(0) if padding == sympy.true else expr.first_key


def is_sink(sinks: int, site: Site) -> Any:
    """Whether a key is one of the first of a query's text. All keys are where these are not consecutive."""
    first = first_key(site)
    return k < first + sinks if sinks or first != 0 else sympy.false


def _data(site: Site) -> Any:
    """The conditions on data that say where texts begin and end. The causal one may read the length of a cache."""
    causal = () if site.position is None else (expr.k <= site.position, expr.k < site.position + 1)
    return sympy.And(*[part for part in expr.conjuncts(text_conditions(site.spec.predicate)) if part not in causal])


def is_causal(site: Site, _params: Params) -> bool:
    return site.position is not None


def no_data_mask(site: Site, _params: Params) -> bool:
    return tile_ranges(site.spec.predicate).residual == sympy.true


def same_data_for_heads(site: Site, _params: Params) -> bool:
    """Whether a query's first key is the same for all heads."""
    data = _data(site)
    named = any(spec.name == expr.FIRST_KEY for spec in site.spec.captures)
    return expr.h not in expr.free_symbols(data) and not (data != sympy.true and named)


def has_sinks(site: Site, params: Any) -> bool:
    """Whether no query that sees a key gives NaN: with padding, its own key may be masked."""
    out_of_reach = bool(tile_ranges(site.spec.predicate).lower)  # sinks beyond the model's own window
    kept = params.sinks > 0 and not out_of_reach
    return _data(site) == sympy.true or kept or site.spec.empty_rows != "nan"


def no_dropout(site: Site, _params: Params) -> bool:
    return not site.spec.dropout


def only_causal(site: Site, _params: Params) -> bool:
    """Whether the mask is ``k <= position`` and conditions on data, with one position for all batches and heads."""
    keys = tile_ranges(site.spec.predicate)
    return (
        site.position is not None
        and not keys.choice
        and not keys.lower
        and len(keys.upper) == 1
        and not expr.free_symbols(site.position) & {expr.b, expr.h}
    )


def plain_score(site: Site, _params: Params) -> bool:
    return not expr.free_symbols(site.spec.score) & set(expr.INDICES) and not expr.loads_of(site.spec.score)


def is_prefill(site: Site, _params: Params) -> bool:
    return site.stage != "decode"


def same_mask_for_heads(site: Site, _params: Params) -> bool:
    return expr.h not in expr.free_symbols(site.spec.predicate)


CAUSAL = Rule(
    Why.CAUSAL,
    is_causal,
    "the mask is not causal, so a query has no position to measure distances from",
    "this form is defined for causal self-attention",
)
FROM_THE_START = Rule(
    Why.DATA_MASK,
    no_data_mask,
    "the mask depends on data (padding or documents): distances and sinks would be counted from padding",
    "leave attention_mask out where nothing is padded, or keep such sites exact",
)
FROM_THE_FIRST_KEY = Rule(
    Why.DATA_BY_HEAD,
    same_data_for_heads,
    "the mask depends on data and differs between heads: a query has no first key to count from",
    "keep such sites exact",
)
SINKS_ON_PADDING = Rule(
    Why.SINKS_ON_PADDING,
    has_sinks,
    "the mask depends on data (padding or documents), and without sinks in reach a padded query may be left without "
    "any key, which gives NaN here",
    "set sinks to 1 or more, or leave attention_mask out where nothing is padded",
)
NO_DROPOUT = Rule(
    Why.DROPOUT,
    no_dropout,
    "attention dropout is live, and this form has none",
    "call model.eval(), set it to 0, or keep this site exact for training",
)
ONLY_CAUSAL = Rule(
    Why.ONLY_CAUSAL,
    only_causal,
    "the mask is more than causal (a sliding window, or chunks): it leaves little to select",
    "keep such layers exact",
)
PLAIN_SCORE = Rule(
    Why.PLAIN_SCORE,
    plain_score,
    "the score depends on positions or on data (ALiBi, a bias): keys are selected by query and key alone",
    "keep this site exact",
)
PREFILL = Rule(
    Why.PREFILL,
    is_prefill,
    "this form is defined for prefill; decoding reads the whole cache, as in the paper",
    'name stage = "prefill" in the rule, so that decoding stays exact and is not refused',
)
SAME_MASK = Rule(
    Why.SAME_MASK,
    same_mask_for_heads,
    "the mask differs between heads, and this form ranks keys for several heads at once",
    "keep this site exact",
)
