"""A site that no graph holds, for tests that ask a form what it keeps or selects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import k, q, s
from effattn.ir.site import Layout, Site, called_site


def causal_site(position: Any = q, predicate: Any = None, heads: int = 4, **changes: Any) -> Site:
    """Causal attention whose queries stand at ``position`` among the keys."""
    spec = AttentionSpec(s, k <= position if predicate is None else predicate)
    sizes = Layout(batch=1, heads=heads, kv_heads=2, q_len=64, k_len=64, head_dim=16, value_dim=16)
    return replace(called_site(spec, position, sizes), **{"device": "cpu", **changes})
