"""Random attention code: spelling x mask x score x layout x type x groups, found and equal to the function itself.

EFFATTN_CASES=500 tries more cases; EFFATTN_SEED picks others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from hypothesis import HealthCheck, given, seed, settings

D = 8
MIN = torch.finfo(torch.float32).min
INF = float("inf")
CASES = int(os.environ.get("EFFATTN_CASES", "25"))

# -- masks: (q index [Nq, 1], k index [1, Nk], data) -> bool [B or 1, H or 1, Nq, Nk] ------------------------------

MASKS = {
    "none": lambda i, j, data: None,
    "causal": lambda i, j, data: (j <= i)[None, None],
    "causal by comparison of sums": lambda i, j, data: ~(j - i > 0)[None, None],
    "offset": lambda i, j, data: (j <= i + (j.shape[1] - i.shape[0]))[None, None],
    "window": lambda i, j, data: ((j <= i) & (i - j < 4))[None, None],
    "both sides": lambda i, j, data: ((i - j).abs() <= 3)[None, None],
    "sinks": lambda i, j, data: ((j <= i) & ((j < 2) | (i - j < 5)))[None, None],
    "prefix": lambda i, j, data: ((j <= i) | (j < 3))[None, None],
    "blocks": lambda i, j, data: ((j // 4 == i // 4) & (j <= i))[None, None],
    "triangle": lambda i, j, data: torch.ones(i.shape[0], j.shape[1]).tril(1)[None, None] > 0,
    "padding": lambda i, j, data: data["padding"][:, None, None],
    "causal padding": lambda i, j, data: (j <= i)[None, None] & data["padding"][:, None, None],
    "documents": lambda i, j, data: (data["ids"][:, :, None] == data["ids"][:, None])[:, None, -i.shape[0] :],
    "lengths": lambda i, j, data: (j[None] < data["lengths"][:, None, None])[:, None],
    "heads": lambda i, j, data: (j <= i) & (data["heads"][None, :, None, None] | (i - j < 3)),
    "index": lambda i, j, data: data["padding"][torch.arange(len(data["padding"]))[:, None, None, None], j],
}
SCORES = {
    "plain": lambda s, i, j, data: s,
    "scaled": lambda s, i, j, data: s * 0.3,
    "divided": lambda s, i, j, data: s / D**0.5,
    "soft cap": lambda s, i, j, data: torch.tanh(s / 3) * 3,
    "alibi": lambda s, i, j, data: s * 0.3 - data["slopes"][:, None, None] * (i - j).abs(),
    "alibi of keys": lambda s, i, j, data: s + data["slopes"].view(1, -1, 1, 1) * j,
    "bias": lambda s, i, j, data: s * 0.5 + data["bias"][None, :, : i.shape[0], : j.shape[1]],
    "shifted": lambda s, i, j, data: s + 1.5,
    "clamped": lambda s, i, j, data: s.clamp(-2, 2),
    "distance": lambda s, i, j, data: s - 0.1 * torch.maximum(i, j),
    "alternating": lambda s, i, j, data: torch.where((i + j) % 2 == 0, s, s * 0.5),
}
FILLS = {
    "where -inf": lambda s, mask: torch.where(mask, s, -INF),
    "where lowest": lambda s, mask: torch.where(mask, s, torch.finfo(s.dtype).min),
    "filled -inf": lambda s, mask: s.masked_fill(~mask, -INF),
    "filled in place": lambda s, mask: s.clone().masked_fill_(mask.logical_not(), -INF),
    "filled -1e9": lambda s, mask: s.float().masked_fill(mask == 0, -1e9),
    "added -inf": lambda s, mask: s + torch.zeros_like(mask, dtype=s.dtype).masked_fill(~mask, -INF),
    "added lowest": lambda s, mask: s + (1.0 - mask.to(s.dtype)) * torch.finfo(s.dtype).min,
    "added in two steps": lambda s, mask: s + torch.where(mask.expand(s.shape), 0.0, -INF),
    "multiplied": lambda s, mask: s.float() * mask - 1e9 * (1 - mask.float()),
}
PRODUCTS = {
    "@": lambda q, k: q @ k.mT,
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, q.shape[:2]),
    "keys first": lambda q, k: (k @ q.mT).transpose(2, 3),
    "scaled query": lambda q, k: (q * 0.5) @ k.permute(0, 1, 3, 2),
    "scaled both": lambda q, k: (q / 2) @ (0.5 * k).mT,
}
OUTPUTS = {
    "@": lambda w, v: w @ v,
    "einsum": lambda w, v: torch.einsum("bhij,bhjd->bhid", w, v),
    "rows first": lambda w, v: torch.einsum("bhij,bhjd->bihd", w, v).flatten(2),
    "bmm": lambda w, v: torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).view(*w.shape[:3], v.shape[-1]),
    "merged": lambda w, v: (w @ v).transpose(1, 2).reshape(w.shape[0], w.shape[2], -1),
    "transposed": lambda w, v: (v.mT @ w.mT).mT,
}
GROUPS = {
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, dim=1),
    "expand": lambda x, n: x[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2),
    "repeat": lambda x, n: x.repeat(1, n, 1, 1),
}
LAYOUTS = {
    "plain": lambda x: x,
    "rows first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
}
SOFTMAX = {
    "method": lambda s, dtype: s.softmax(-1).to(dtype),
    "function": lambda s, dtype: F.softmax(s, dim=3).to(dtype),
    "float32": lambda s, dtype: torch.softmax(s, -1, dtype=torch.float32).to(dtype),
    "with dropout": lambda s, dtype: F.dropout(s.softmax(-1).to(dtype), 0.1, training=False),
}


@dataclass(frozen=True)
class Recipe:
    """One way to write attention."""

    mask: str
    score: str
    fill: str
    product: str
    output: str
    group: str
    layout: str
    softmax: str
    sdpa: bool

    def __call__(self, q, k, v, data):
        q, k, v = (LAYOUTS[self.layout](x) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (GROUPS[self.group](x, groups) for x in (k, v))
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        mask = MASKS[self.mask](i, j, data)
        if self.sdpa:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = SCORES[self.score](PRODUCTS[self.product](q, k), i, j, data)
        if mask is not None:
            scores = FILLS[self.fill](scores, mask)
        return OUTPUTS[self.output](SOFTMAX[self.softmax](scores, v.dtype), v)


TABLES = {
    "mask": MASKS, "score": SCORES, "fill": FILLS, "product": PRODUCTS, "output": OUTPUTS, "group": GROUPS,
    "layout": LAYOUTS, "softmax": SOFTMAX,
}  # fmt: skip
RECIPES = st.builds(
    Recipe,
    sdpa=st.integers(0, 3).map(lambda n: n == 0),
    **{name: st.sampled_from(list(TABLES[name])) for name in TABLES},
)


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    dtype: torch.dtype
    dynamic: bool
    empty: bool  # a sequence of nothing but padding


SIZES = st.builds(
    Sizes,
    batch=st.sampled_from([1, 2, 3]),
    heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 3]),
    queries=st.sampled_from([1, 5, 9, 17]),
    keys=st.sampled_from([1, 5, 9, 17, 33]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    dynamic=st.booleans(),
    empty=st.booleans(),
)


def arguments(sizes: Sizes):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    heads = sizes.heads * sizes.groups
    q = draw(sizes.batch, heads, sizes.queries, D).to(sizes.dtype)
    k, v = (draw(sizes.batch, sizes.heads, sizes.keys, D).to(sizes.dtype) for _ in range(2))
    padding = draw(sizes.batch, sizes.keys) > -0.5
    padding[:, 0] = True
    if sizes.empty:
        padding[-1] = False
    data = {
        "padding": padding,
        "ids": torch.arange(max(sizes.keys, sizes.queries)).expand(sizes.batch, -1)[:, : sizes.keys] // 6,
        "lengths": torch.arange(sizes.batch) + (0 if sizes.empty else 1),
        "heads": torch.arange(heads) % 2 == 0,
        "slopes": 2.0 ** -torch.arange(1, heads + 1),
        "bias": draw(heads, 40, 40),
    }
    return q, k, v, data


# reasons that a random recipe may be left alone for
ALLOWED = ("a row may attend to nothing", "the mask allows nothing at all", "mix torch.", "the query has fewer heads")
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def fits(recipe: Recipe, sizes: Sizes) -> bool:
    square = recipe.mask not in ("documents",) or sizes.queries <= sizes.keys
    half = sizes.dtype in (torch.float16, torch.bfloat16)
    return square and not (half and not recipe.sdpa and recipe.score in ("alibi", "alibi of keys", "bias", "distance"))


@seed(int(os.environ.get("EFFATTN_SEED", "0")))
@settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(recipe=RECIPES, sizes=SIZES)
def test_random_attention(recipe, sizes):
    if not fits(recipe, sizes):
        return
    given_args = arguments(sizes)
    lengths = (0, 2) if sizes.dynamic else ()

    def function(q, k, v, padding, ids, lengths, heads, slopes, bias):
        names = ("padding", "ids", "lengths", "heads", "slopes", "bias")
        return recipe(q, k, v, dict(zip(names, (padding, ids, lengths, heads, slopes, bias), strict=True)))

    report, _ = compiled(
        function, *given_args[:3], *given_args[3].values(), lengths=lengths, tolerance=TOLERANCE[sizes.dtype]
    )
    assert len(report.sites) + len(report.missed) == 1
    one_of_everything = sizes.queries == sizes.heads * sizes.groups == 1  # views cannot tell rows from heads then
    for missed in report.missed if not one_of_everything else ():
        assert any(reason in missed.reason for reason in ALLOWED), missed.reason


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe) if field.name != "sdpa"])
def test_every_entry_of_the_tables_is_found(field):
    """Each alone, beside the plainest of all others: none is a case that never runs."""
    plain = Recipe("causal", "scaled", "where -inf", "@", "@", "expand", "plain", "method", False)
    q, k, v, data = arguments(Sizes(2, 2, 2, 9, 9, torch.float32, False, False))
    for name in TABLES[field]:
        recipe = Recipe(**{**vars(plain), field: name})
        report, _ = compiled(lambda q, k, v, recipe=recipe: recipe(q, k, v, data), q, k, v, tolerance=3e-5)
        assert len(report.sites) == 1, (name, report.missed)


@seed(int(os.environ.get("EFFATTN_SEED", "0")))
@settings(max_examples=max(CASES // 5, 4), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(recipe=RECIPES, sizes=SIZES)
def test_random_gradients(recipe, sizes):
    from effattn.compiler.backend import effattn

    if not fits(recipe, sizes) or sizes.dtype != torch.float32 or sizes.empty:
        return
    torch._dynamo.reset()
    q, k, v, data = arguments(sizes)
    fast = torch.compile(
        lambda *args: recipe(*args, data),
        backend=lambda gm, inputs: effattn(gm, inputs, options={"rest": "eager", "strict": True}),
    )
    results = []
    for run in (lambda *args: recipe(*args, data), fast):
        given_args = [x.clone().requires_grad_() for x in (q, k, v)]
        out = run(*given_args)
        out.mul(torch.linspace(-1, 1, out.numel()).view_as(out)).nan_to_num().sum().backward()
        results.append([x.grad.nan_to_num() for x in given_args])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-4)
