"""Plans that kernels are tried on: every kind of mask, score and data, with tensors to go with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import sympy
import torch

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import (
    BitAnd,
    BitOr,
    BitXor,
    FloorDiv,
    Group,
    IsPowerOfTwo,
    Modulo,
    Nk,
    Nq,
    Table,
    Where,
    b,
    h,
    k,
    load,
    number,
    q,
    s,
    scalar,
)
from effattn.ir.plan import Plan

CAUSAL = sympy.Le(k, q)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    q_len: int = 57
    k_len: int = 57
    head_dim: int = 16
    value_dim: int = 16

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Call:
    """A plan and everything that is passed beside query, key and value."""

    plan: Plan
    captures: list[torch.Tensor] = field(default_factory=list)
    scalars: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)


Build = Callable[[Sizes, torch.device], Call]
CASES: dict[str, Build] = {}


def case(build: Build) -> Build:
    CASES[build.__name__] = build
    return build


def power_keep(block: int, window: int, sinks: int, position=q):
    distance = FloorDiv(position, block) - FloorDiv(k, block)
    return sympy.Or(distance < window // block, IsPowerOfTwo(distance), k < sinks)


def _random(shape, device, seed=3, dtype=torch.float32):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return made.to(dtype).to(device)


def _padding(sizes: Sizes, device, left: bool) -> torch.Tensor:
    """bool [B, Nk]: the first batch is whole, later ones lack a growing part on one side."""
    live = torch.arange(sizes.batch) * (sizes.k_len // (sizes.batch + 1))
    columns = torch.arange(sizes.k_len)[None, :]
    mask = columns >= live[:, None] if left else columns < (sizes.k_len - live)[:, None]
    return mask.to(device)


@case
def none(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s)))


@case
def causal(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, CAUSAL, empty_rows="never")))


@case
def causal_from_the_end(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.Le(k, q + Nk - Nq))))


@case
def window(sizes, device):
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, q - k < 13)))


@case
def two_sided_window(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(k - q < 9, q - k < 20))))


@case
def window_and_sinks(sizes, device):
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, sympy.Or(q - k < 10, k < 5))))


@case
def wide_window(sizes, device):
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, q - k < 37)))


@case
def wide_window_and_sinks(sizes, device):
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, sympy.Or(q - k < 37, k < 7))))


@case
def chunked(sizes, device):
    return Call(
        Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, sympy.Ge(FloorDiv(k, 24), FloorDiv(q, 24)))))
    )


@case
def power_16(sizes, device):
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, power_keep(16, 32, 7))))


@case
def power_32_no_sinks(sizes, device):
    distance = FloorDiv(q, 32) - FloorDiv(k, 32)
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, sympy.Or(distance < 1, IsPowerOfTwo(distance)))))


@case
def power_32_few_sinks(sizes, device):
    """Sinks and near band end within a block: tiles of listed blocks are cut."""
    distance = FloorDiv(q, 32) - FloorDiv(k, 32)
    keep = sympy.Or(q - k < 11, IsPowerOfTwo(distance), k < 7)
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, keep)))


@case
def power_at_an_offset(sizes, device):
    shift = scalar("past")
    position = q + shift
    plan = Plan(
        "power",
        AttentionSpec(sizes.scale * s, sympy.Le(k, position), power_keep(16, 16, 3, position), scalars=("past",)),
    )
    return Call(plan, scalars=[sizes.k_len - sizes.q_len])


@case
def power_at_a_known_offset(sizes, device):
    position = q + 3
    return Call(Plan("power", AttentionSpec(sizes.scale * s, sympy.Le(k, position), power_keep(16, 16, 3, position))))


@case
def power_by_pointer(sizes, device):
    position = q + load("start", [], integer=True)
    plan = Plan("power", AttentionSpec(sizes.scale * s, sympy.Le(k, position), power_keep(16, 16, 16, position)))
    plan = replace(plan, spec=replace(plan.spec, captures=(CaptureSpec("start", "int64", 0),)))
    return Call(plan, captures=[torch.tensor(max(0, sizes.k_len - sizes.q_len - 5), device=device)])


@case
def power_two_sided(sizes, device):
    """No causality: blocks behind by the list, a near band that ends, and listed blocks on both sides of it."""
    distance = FloorDiv(q, 16) - FloorDiv(k, 16)
    keep = sympy.Or(sympy.And(distance >= 2, distance < 4), IsPowerOfTwo(distance), k < 3)
    return Call(Plan("power", AttentionSpec(sizes.scale * s, sympy.true, keep)))


@case
def power_of_odd_blocks(sizes, device):
    """Blocks that no tile divides: everything in the band is visited and tested."""
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, power_keep(12, 12, 2))))


@case
def list_alone(sizes, device):
    distance = FloorDiv(q, 16) - FloorDiv(k, 16)
    return Call(Plan("power", AttentionSpec(sizes.scale * s, CAUSAL, sympy.Or(IsPowerOfTwo(distance), k < 4))))


@case
def right_padding(sizes, device):
    padding = sympy.Ne(load("padding", [b, k], integer=True), 0)
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, padding), captures=(CaptureSpec("padding", "bool", 2),)),
    )
    return Call(plan, captures=[_padding(sizes, device, left=False)])


@case
def left_padding(sizes, device):
    padding = sympy.Ne(load("padding", [b, k], integer=True), 0)
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, padding), captures=(CaptureSpec("padding", "bool", 2),)),
    )
    return Call(plan, captures=[_padding(sizes, device, left=True)])


@case
def lengths_per_batch(sizes, device):
    plan = Plan("exact", AttentionSpec(sizes.scale * s, k < load("lengths", [b], integer=True)))
    plan = replace(plan, spec=replace(plan.spec, captures=(CaptureSpec("lengths", "int32", 1),)))
    lengths = torch.tensor([max(0, sizes.k_len - 11 * i) for i in range(sizes.batch)], dtype=torch.int32)
    return Call(plan, captures=[lengths.to(device)])


@case
def documents(sizes, device):
    same = sympy.Eq(load("document", [b, q], integer=True), load("document", [b, k], integer=True))
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, same), captures=(CaptureSpec("document", "int64", 2),)),
    )
    ids = torch.arange(max(sizes.q_len, sizes.k_len)).div(19, rounding_mode="floor").expand(sizes.batch, -1)
    return Call(plan, captures=[ids.to(device)])


@case
def blocks_in_a_table(sizes, device):
    """One boolean for each pair of blocks, as FlexAttention's block masks list them."""
    listed = sympy.Ne(load("blocks", [b, 0, FloorDiv(q, 32), FloorDiv(k, 32)], integer=True), 0)
    plan = Plan(
        "exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, listed), captures=(CaptureSpec("blocks", "bool", 4),))
    )
    table = _random((sizes.batch, 1, -(-sizes.q_len // 32), -(-sizes.k_len // 32)), device) > 0
    return Call(plan, captures=[table])


@case
def cache_by_pointer(sizes, device):
    """A static cache: keys up to a position that only the device knows."""
    live = load("live", [], integer=True)
    plan = Plan(
        "exact", AttentionSpec(sizes.scale * s, sympy.Le(k, q + live), captures=(CaptureSpec("live", "int64", 0),))
    )
    return Call(plan, captures=[torch.tensor(max(0, sizes.k_len // 3), device=device)])


@case
def opaque_mask(sizes, device):
    seen = sympy.Ne(load("mask", [b, h, q, k], integer=True), 0)
    plan = Plan("exact", AttentionSpec(sizes.scale * s, seen, captures=(CaptureSpec("mask", "bool", 4),)))
    mask = _random((sizes.batch, 1, sizes.q_len, sizes.k_len), device) > 0
    mask[:, :, sizes.q_len // 2] = False
    return Call(plan, captures=[mask])


@case
def soft_cap(sizes, device):
    return Call(Plan("exact", AttentionSpec(5.0 * sympy.tanh(sizes.scale * s / 5.0), CAUSAL)))


@case
def decay_of_times(sizes, device):
    """Times so large that the score has no digits left beside one of them, and their difference is small."""
    times = load("times", [q], integer=False) - load("times", [k], integer=False)
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s - 0.1 * Group(times), CAUSAL, captures=(CaptureSpec("times", "float32", 1),)),
    )
    return Call(plan, [1e7 + torch.arange(max(sizes.q_len, sizes.k_len), device=device).float()])


@case
def alibi(sizes, device):
    slopes = load("slopes", [h], integer=False)
    plan = Plan(
        "exact",
        AttentionSpec(sizes.scale * s + slopes * (k - q), CAUSAL, captures=(CaptureSpec("slopes", "float32", 1),)),
    )
    return Call(plan, captures=[2.0 ** -torch.arange(1, sizes.heads + 1, device=device)])


@case
def bias(sizes, device):
    added = load("bias", [0 * b, h, q, k], integer=False)
    plan = Plan("exact", AttentionSpec(sizes.scale * s + added, captures=(CaptureSpec("bias", "float32", 4),)))
    return Call(plan, captures=[_random((1, sizes.heads, sizes.q_len, sizes.k_len), device)])


@case
def bias_by_distance(sizes, device):
    """A table of relative positions, clamped: indices that are computed."""
    place = sympy.Max(0, sympy.Min(31, q - k + 16))
    plan = Plan("exact", AttentionSpec(sizes.scale * s + load("table", [h, place], integer=False)))
    plan = replace(plan, spec=replace(plan.spec, captures=(CaptureSpec("table", "float32", 2),)))
    return Call(plan, captures=[_random((sizes.heads, 32), device)])


@case
def decomposed_positions(sizes, device):
    """A bias from the rows and columns of a picture, as in SAM; heads in two digits."""
    place = [b, Modulo(h, 2), FloorDiv(q, 8), Modulo(q, 8)]
    rows, columns = (load(name, [*place, at(k, 8)], integer=False) for name, at in (("y", FloorDiv), ("x", Modulo)))
    captures = (CaptureSpec("y", "float32", 5), CaptureSpec("x", "float32", 5))
    plan = Plan("exact", AttentionSpec(sizes.scale * s + Group(rows + columns), captures=captures))
    shape = (sizes.batch, 2, sizes.q_len // 8 + 1, 8)
    return Call(plan, captures=[_random((*shape, sizes.k_len // 8 + 1), device), _random((*shape, 8), device, 4)])


@case
def fills_in_the_score(sizes, device):
    """Two masks that replace or take up the score; where both hide a key there is -inf."""
    lowest, seen = torch.finfo(torch.float32).min, sympy.Ne(load("padding", [b, k], integer=True), 0)
    score = Where(CAUSAL, sizes.scale * s, lowest) + Where(seen, 0, lowest)
    plan = Plan("exact", AttentionSpec(score, empty_rows="nan", captures=(CaptureSpec("padding", "bool", 2),)))
    return Call(plan, captures=[_padding(sizes, device, left=True)])


@case
def minus_infinity_bias(sizes, device):
    added = load("bias", [b, h, q, k], integer=False)
    plan = Plan("exact", AttentionSpec(sizes.scale * s + added, captures=(CaptureSpec("bias", "float32", 4),)))
    mask = torch.ones(sizes.q_len, sizes.k_len).tril()[None, None].to(device)
    return Call(plan, captures=[torch.where(mask > 0, 0.0, float("-inf"))])


@case
def smallest_number_bias(sizes, device):
    added = load("bias", [b, h, q, k], integer=False)
    plan = Plan("exact", AttentionSpec(sizes.scale * s + added, captures=(CaptureSpec("bias", "float32", 4),)))
    mask = torch.ones(sizes.q_len, sizes.k_len).tril(-1)[None, None].to(device)
    return Call(plan, captures=[torch.where(mask > 0, 0.0, torch.finfo(torch.float32).min)])


@case
def scale_at_run_time(sizes, device):
    plan = Plan("exact", AttentionSpec(number("scale") * s, CAUSAL, numbers=("scale",)))
    return Call(plan, numbers=[sizes.scale])


@case
def negative_scale(sizes, device):
    return Call(Plan("exact", AttentionSpec(-sizes.scale * s, CAUSAL)))


@case
def negative_scale_at_run_time(sizes, device):
    return Call(Plan("exact", AttentionSpec(number("scale") * s, CAUSAL, numbers=("scale",))), numbers=[-0.3])


@case
def zero_scale_at_run_time(sizes, device):
    return Call(Plan("exact", AttentionSpec(number("scale") * s, CAUSAL, numbers=("scale",))), numbers=[0.0])


@case
def scale_per_head(sizes, device):
    plan = Plan(
        "exact",
        AttentionSpec(load("scales", [h], integer=False) * s, CAUSAL, captures=(CaptureSpec("scales", "float32", 1),)),
    )
    return Call(plan, captures=[torch.linspace(-0.5, 0.6, sizes.heads, device=device)])


@case
def many_operations(sizes, device):
    odd = sympy.Or(sympy.Eq(Modulo(q - k, 3), 0), sympy.Not(sympy.Eq(Modulo(k - 40, 7), 2)))
    score = sizes.scale * s * Where(k > q, 0.5, 1.0) + 0.1 * sympy.Abs(FloorDiv(q - k, 5)) - sympy.exp(-0.01 * k)
    return Call(Plan("exact", AttentionSpec(score, odd)))


@case
def empty_rows_zero(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, k >= 20), empty_rows="zero")))


@case
def waves(sizes, device):
    return Call(
        Plan("exact", AttentionSpec(sizes.scale * s + sympy.sin(Group(0.3 * q - 0.3 * k)) * sympy.cos(0.1 * k)))
    )


@case
def powers_and_bits(sizes, device):
    score = sizes.scale * s * sympy.Pow(0.99, Group(q - k)) - sympy.Pow(2, -1 - h) * sympy.log(1 + q - k)
    seen = sympy.And(CAUSAL, sympy.Or(BitAnd(BitXor(q, k), 21) < 17, BitOr(q - k, -4) < -2))
    return Call(Plan("exact", AttentionSpec(score, seen)))


@case
def empty_rows_nan(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, k >= 20), empty_rows="nan")))


@case
def empty_rows_mean(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, sympy.And(CAUSAL, k >= 20), empty_rows="mean")))


@case
def empty_rows_uniform(sizes, device):
    """A mask of large numbers that are added: they leave rows without keys equal scores, and their gradients."""
    seen = sympy.And(CAUSAL, sympy.Ne(load("padding", [b, k], integer=True), 0))
    score = Table(h, -0.5, 0.6, 0.2) * s + 0.1 * k
    plan = Plan(
        "exact", AttentionSpec(score, seen, empty_rows="uniform", captures=(CaptureSpec("padding", "bool", 2),))
    )
    return Call(plan, captures=[_padding(sizes, device, left=True)])


@case
def empty_rows_uniform_and_learned(sizes, device):
    """The same with another slope for each pair, and a bias that needs a gradient."""
    seen = sympy.And(CAUSAL, sympy.Ne(load("padding", [b, k], integer=True), 0))
    score = 3 * sympy.tanh(sizes.scale * s + load("bias", [0 * b, h, q, k], integer=False))
    captures = (CaptureSpec("padding", "bool", 2), CaptureSpec("bias", "float32", 4))
    plan = Plan("exact", AttentionSpec(score, seen, empty_rows="uniform", captures=captures))
    bias = _random((1, sizes.heads, sizes.q_len, sizes.k_len), device)
    return Call(plan, captures=[_padding(sizes, device, left=True), bias])


@case
def nothing_at_all(sizes, device):
    return Call(Plan("exact", AttentionSpec(sizes.scale * s, k < 0 * q - 3, empty_rows="zero")))


def tensors(sizes: Sizes, device="cpu", dtype=torch.float32, seed=0, order="bhnd"):
    """Query, key and value, [B, H, N, D]; ``order`` names the dimensions as they lie in memory."""
    shapes = (
        (sizes.batch, sizes.heads, sizes.q_len, sizes.head_dim),
        (sizes.batch, sizes.kv_heads, sizes.k_len, sizes.head_dim),
        (sizes.batch, sizes.kv_heads, sizes.k_len, sizes.value_dim),
    )
    made = []
    for i, shape in enumerate(shapes):
        tensor = _random(shape, device, seed + i, dtype)
        turn = ["bhnd".index(name) for name in order]
        back = [order.index(name) for name in "bhnd"]
        made.append(tensor.permute(turn).contiguous().permute(back))
    return made


@case
def window_per_head(sizes, device):
    """Windows that are known when compiling, one for each head; the last serves all heads beyond."""
    return Call(Plan("window", AttentionSpec(sizes.scale * s, CAUSAL, q - k < Table(h, 5, 30, 30, 1 << 20))))


@case
def constant_slopes(sizes, device):
    """ALiBi, its slopes known when compiling; a number for each distance, up to eight."""
    near = Table(q - k, *(sympy.Float(0.3 * i) for i in range(9)))
    return Call(Plan("exact", AttentionSpec(sizes.scale * s + Table(h, 0.5, 0.25) * (k - q) + near, CAUSAL)))


BY_HEAD = ("window_per_head",)  # heads of a tile see different keys: never decoded
