"""What a form is: a way to compute a site. One file each, all data: parameters, rules, kept keys, cost, reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sympy
from pydantic import BaseModel, ConfigDict

from effattn.ir import expr
from effattn.ir.site import Refusal, Site
from effattn.lowering.tiles import walk

Kind = Literal["exact", "approximate", "trained"]


class Params(BaseModel):
    """Parameters of a form as a policy may set them. Unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class Rule:
    """One condition that a form puts on a site. The same row checks and explains."""

    name: str
    holds: Callable[[Site, Any], bool]
    otherwise: str  # why not, when it does not hold
    hint: str = ""  # what would help

    def refusal(self, site: Site, params: Params) -> Refusal | None:
        return None if self.holds(site, params) else Refusal(self.name, self.otherwise, self.hint)


@dataclass(frozen=True)
class Cost:
    """Work of one call as sympy terms in Nq and Nk (other sizes already numbers): FLOPs, bytes moved, launches."""

    flops: Any
    bytes: Any
    launches: int = 1

    def at(self, q_len: int, k_len: int) -> tuple[float, float]:
        """(FLOPs, bytes) at these lengths."""
        sizes = {expr.Nq: q_len, expr.Nk: k_len}
        return float(sympy.sympify(self.flops).subs(sizes)), float(sympy.sympify(self.bytes).subs(sizes))


@dataclass(frozen=True)
class Form:
    """A way to compute a site."""

    name: str
    kind: Kind
    summary: str
    source: str
    params: type[Params]
    rules: tuple[Rule, ...]
    keep: Callable[[Any, Any], Any]  # (params, position of the query row) -> predicate over (position, k)
    kept_keys: Callable[[Any], Any]  # params -> keys that a causal row of Nk keeps, as a sympy term in Nk: for costs
    reference: Callable[..., Any]  # (params, q_index [Nq, 1], k_index [1, Nk]) -> bool [Nq, Nk]: the eager definition

    def refusals(self, site: Site, params: Params) -> tuple[Refusal, ...]:
        """Every reason why this form does not apply to ``site``; empty if it does."""
        found = (rule.refusal(site, params) for rule in self.rules)
        return tuple(refusal for refusal in found if refusal is not None)

    def cost(self, site: Site, params: Params) -> Cost:
        """FLOPs and bytes of one call; causal sites pay for half of the dense square."""
        sizes = site.hints
        heads = sizes.batch * sizes.heads
        pairs = expr.Nq * self.kept_keys(params)
        if site.position is not None and self.kind == "exact":
            pairs = pairs - expr.Nq * (expr.Nq - 1) / 2
        flops = 2 * heads * (sizes.head_dim + sizes.value_dim) * pairs
        element = 4 if site.dtype == "float32" else 2
        kv = sizes.batch * sizes.kv_heads * (sizes.head_dim + sizes.value_dim) * expr.Nk
        moved = element * (heads * (sizes.head_dim + sizes.value_dim) * expr.Nq + kv)
        return Cost(flops, moved)


def is_causal(site: Site, _params: Params) -> bool:
    return site.position is not None


def no_data_mask(site: Site, _params: Params) -> bool:
    return walk(site.predicate).residual == sympy.true


def no_gradient(site: Site, _params: Params) -> bool:
    return not site.needs_grad


CAUSAL = Rule(
    "causal",
    is_causal,
    "the mask is not causal, so a query has no position to measure distances from",
    "this form is defined for causal self-attention",
)
FROM_THE_START = Rule(
    "no data mask",
    no_data_mask,
    "the mask depends on data (padding or documents): distances and sinks would be counted from padding",
    "leave out an attention_mask that is all ones, or keep this site exact",
)
NO_BACKWARD = Rule(
    "no gradient",
    no_gradient,
    "gradients are needed and this form has no backward",
    "run under torch.no_grad() or torch.inference_mode(), or keep this site exact for training",
)
