"""The definition of a form, a way to compute a site: parameters, rules, kept keys, cost and reference, all as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sympy
from pydantic import BaseModel, ConfigDict

from effattn.ir import expr
from effattn.ir.refusal import Refusal, Why
from effattn.ir.selector import Selector
from effattn.ir.site import Layout, Site
from effattn.lowering.cost import Cost, Work, pairs
from effattn.lowering.iteration.tile_ranges import key_conditions, tile_ranges

Kind = Literal["exact", "approximate", "trained"]


class Params(BaseModel):
    """Parameters of a form, as set in a policy. Unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


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
    """The first key of a query's text, for forms with the rule FROM_THE_FIRST_KEY."""
    padding, _ = key_conditions(tile_ranges(site.spec.predicate).residual)
    return sympy.Integer(0) if padding == sympy.true else expr.first_key


def is_causal(site: Site, _params: Params) -> bool:
    return site.position is not None


def no_data_mask(site: Site, _params: Params) -> bool:
    return tile_ranges(site.spec.predicate).residual == sympy.true


def _beside_lists(residual: Any) -> Any:
    """Conditions on data, without block lists passed by the caller. Lists can only hide whole blocks, and none of a
    mask from create_block_mask, so distances are not counted from them."""
    parts = expr.conjuncts(residual)
    lists = [part for part in parts if isinstance(part, sympy.Ne) and isinstance(part.lhs, expr.Load)]
    return sympy.And(*[part for part in parts if part not in lists or not expr.is_of_blocks(part.lhs)])


def padding_at_most(site: Site, _params: Params) -> bool:
    """Whether the only data in the mask depend on batch and key."""
    alone, others = key_conditions(_beside_lists(tile_ranges(site.spec.predicate).residual))
    named = any(spec.name == expr.FIRST_KEY for spec in site.spec.captures)
    return others == sympy.true and not (alone != sympy.true and named)


def has_sinks(site: Site, params: Any) -> bool:
    """Whether every query that sees a key keeps one: with padding, its own key may be masked."""
    keys = tile_ranges(site.spec.predicate)
    out_of_reach = bool(keys.lower) and site.spec.empty_rows == "nan"  # sinks beyond the model's own window
    return _beside_lists(keys.residual) == sympy.true or (params.sinks > 0 and not out_of_reach)


def no_gradient(site: Site, _params: Params) -> bool:
    return not site.needs_grad


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
    Why.DATA_BESIDE_PADDING,
    padding_at_most,
    "the mask depends on data other than padding (documents): distances and sinks would be counted from other texts",
    "keep such sites exact",
)
SINKS_ON_PADDING = Rule(
    Why.SINKS_ON_PADDING,
    has_sinks,
    "the mask depends on data (padding), and without sinks in reach a padded query may be left without any key",
    "set sinks to 1 or more, or leave attention_mask out where nothing is padded",
)
NO_BACKWARD = Rule(
    Why.GRADIENT,
    no_gradient,
    "gradients are needed and this form has no backward",
    "run under torch.no_grad() or torch.inference_mode(), or keep this site exact for training",
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
