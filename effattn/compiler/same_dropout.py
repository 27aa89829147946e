"""The dropout of ``effattn::attend`` in the untouched graph, so that ``verify`` may compare their results.

User code's dropout is replaced there by that of the op, with a seed that is drawn where the rewritten graph draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effattn.passes.candidate.record import Match
from effattn.passes.choose.record import Choice
from effattn.runtime import philox
from effattn.runtime.algebra import evaluate


def dropped_alike(choices: Sequence[Choice]) -> dict[str, Match]:
    """The sites whose dropout is the op's, by the name of the node that drops."""
    found = (choice.match for choice in choices if choice.route == "op")
    return {match.nodes.dropout.node.name: match for match in found if match.nodes.dropout is not None}


def comparable(choices: Sequence[Choice]) -> bool:
    """Whether no dropout became that of SDPA's kernels, which say nothing of what they drop."""
    return not any(choice.route == "sdpa" and choice.match.nodes.dropout is not None for choice in choices)


def drop(match: Match, sizes: Mapping[str, int], given: Any) -> Tensor:
    """The result of the node that drops.

    Args:
        sizes: of "b", "h", "q" and "k".
        given: the weights, or the arguments of the SDPA call by name.
    """
    dropout, spec = match.nodes.dropout, match.site.spec
    assert dropout is not None
    like = given if isinstance(given, Tensor) else given["query"]
    seed = torch.randint(0, philox.SEEDS, (), device=like.device)
    pairs = torch.arange(sizes["b"] * sizes["h"], device=like.device).view(sizes["b"], sizes["h"], 1, 1)
    kept = philox.kept(seed, spec.least_kept, pairs, (0, sizes["q"]), [(0, sizes["k"])])
    if isinstance(given, Tensor):
        return given * _placed(kept, dropout.index, given.shape) * spec.kept_scale
    shape = torch.Size((*given["query"].shape[:-1], sizes["k"]))
    kept, mask = _placed(kept, dropout.index, shape), given.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:  # that operator adds it
        mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)
    return torch.ops.aten._scaled_dot_product_attention_math(
        *(given[name] for name in ("query", "key", "value")),
        mask,
        dropout.probability,
        given.get("is_causal", False),
        kept,
        scale=given.get("scale"),
        enable_gqa=given.get("enable_gqa", False),
    )[0]


def _placed(kept: Tensor, index: Sequence[Any], shape: torch.Size) -> Tensor:
    """``kept`` [B, H, Nq, Nk] in the dimensions of the weights, of which each has an index in b, h, q and k."""
    names = {name: torch.arange(size, device=kept.device) for name, size in zip("bhqk", kept.shape, strict=True)}
    symbols: dict[str, Any] = {name: names[name].view([-1] + [1] * (3 - dim)) for dim, name in enumerate("bhqk")}
    symbols |= {"Nq": kept.shape[2], "Nk": kept.shape[3]}
    places = [
        torch.as_tensor(0 if size == 1 else evaluate(term, symbols, {}, torch.float64, kept.device), device=kept.device)
        for term, size in zip(index, shape, strict=True)
    ]
    found = kept.new_zeros(shape)
    found[torch.broadcast_tensors(*places, kept)[:-1]] = kept
    return found
