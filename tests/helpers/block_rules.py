"""Random predicates of every kind that a mask may be, and the pairs of blocks that they keep, counted one by one."""

from __future__ import annotations

import math

import sympy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import (
    BitAnd,
    BitXor,
    FloorDiv,
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
from effattn.runtime.algebra import evaluate
from effattn.runtime.operations import boolean

BATCH, HEADS, LONGEST = 2, 3, 96
SCALARS, NUMBERS = {"past": 5, "reach": 20}, {"factor": 2.5}


def _captures() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)

    def ints(high, *shape):
        return torch.randint(0, high, shape, generator=made)

    times = torch.rand(BATCH, LONGEST, generator=made).cumsum(-1)
    times[1, 40] = math.nan
    times[1, 60:] = math.inf
    slopes = torch.linspace(-3, 3, 2 * LONGEST)
    slopes[LONGEST + 50] = math.nan
    stamps = ints(5, BATCH, LONGEST)
    stamps[0, 33], stamps[1, 50] = 2**63 - 1, -(2**63)
    return {
        "live": torch.tensor(7),
        "lengths": torch.tensor([11, 53]),
        "per_head": torch.tensor([0, 3, 40]),
        "padding": torch.arange(LONGEST) >= torch.tensor([[20], [0]]),
        "document": (torch.arange(LONGEST) // torch.tensor([[17], [40]])).long(),
        "order": torch.randperm(LONGEST, generator=made),
        "kinds": ints(3, BATCH, LONGEST).to(torch.int8),
        "stamps": stamps,
        "times": times,
        "pairs": torch.rand(BATCH, 1, LONGEST, LONGEST, generator=made) > 0.1,
        "levels": torch.rand(1, HEADS, LONGEST, LONGEST, generator=made).double(),
        "blocks": torch.rand(HEADS, 13, 13, generator=made) > 0.5,
        "grades": torch.rand(13, 13, generator=made),
        "far": torch.rand(2 * LONGEST, generator=made) > 0.5,
        "none": torch.tensor(math.nan),
        "steps": (torch.arange(LONGEST) // torch.tensor([[5], [16], [30]])).to(torch.int16),
        "slopes": slopes,
        "band": (torch.arange(2 * LONGEST) - LONGEST - 20).abs() < 20,
    }


CAPTURES = _captures()
SPECS = tuple(
    CaptureSpec(name, str(tensor.dtype).removeprefix("torch."), tensor.ndim) for name, tensor in CAPTURES.items()
)


def spec_of(rule) -> AttentionSpec:
    used = {each.name for each in sympy.sympify(rule).atoms(load("x", [], integer=True).func.__mro__[1])}
    return AttentionSpec(
        0.25 * s,
        rule,
        captures=tuple(each for each in SPECS if each.name in used),
        scalars=tuple(SCALARS),
        numbers=tuple(NUMBERS),
    )


def given_to(spec: AttentionSpec) -> tuple[list, list, list]:
    return [CAPTURES[each.name] for each in spec.captures], [*SCALARS.values()], [*NUMBERS.values()]


def of(name: str, *indices):
    return load(name, indices, integer=not CAPTURES[name].is_floating_point())


small = st.integers(-20, 60)
blocks = st.sampled_from([2, 3, 8, 16, 24])


@st.composite
def terms(draw, x, deep=2):
    """A number that depends on the position ``x`` (q or k), and maybe on batch and head."""
    simple = [
        x,
        x,
        x + scalar("past"),
        x + of("live"),
        x + of("per_head", h),
        2 * x,
        -x,
        of("lengths", b),
        sympy.Integer(3),
    ]
    loads = [
        of("document", b, x),
        of("kinds", b, x),
        of("stamps", b, x),
        of("order", x),
        of("document", b, of("order", x)),
        of("document", b, Modulo(x + scalar("past"), LONGEST)),
        x - of("document", b, x) * 17,
    ]
    if deep == 0 or draw(st.booleans()):
        return draw(st.sampled_from(simple if deep == 0 or draw(st.booleans()) else loads))
    one, block, other = draw(terms(x, deep=deep - 1)), draw(blocks), draw(small)
    made = [
        lambda: one + other,
        lambda: FloorDiv(one, block),
        lambda: Modulo(one, block),
        lambda: FloorDiv(one, block) * block,
        lambda: sympy.Max(one, other),
        lambda: sympy.Min(one, 30 + 4 * h),
        lambda: sympy.Abs(one - other),
        lambda: BitAnd(one, 7),
        lambda: BitXor(x, abs(other)),
        lambda: Where(x < other, one, x),
        lambda: Table(h, sympy.Integer(4), sympy.Integer(40), sympy.Integer(9)) + one,
    ]
    return draw(st.sampled_from(made))()


@st.composite
def floats(draw, x):
    return draw(
        st.sampled_from(
            [
                of("times", b, x),
                of("times", b, x) * number("factor"),
                0.37 * x - 3.1,
                of("times", b, x) - 0.31 * x,
                sympy.tanh(0.05 * x) * 3,
                sympy.exp(-0.1 * x),
                sympy.Max(of("times", b, x), 4.5),
                number("factor") * of("per_head", h),
                of("none"),
                sympy.Float(7.5),
            ]
        )
    )


@st.composite
def atoms(draw):
    relation = draw(st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne]))
    block = draw(blocks)
    distance = q + draw(st.sampled_from([0, Nk - Nq, scalar("past")])) - k
    other = draw(small)
    made = [
        lambda: relation(draw(terms(q)), draw(terms(k))),
        lambda: relation(draw(terms(q)), draw(terms(k))),
        lambda: relation(draw(terms(draw(st.sampled_from([q, k])))), other),
        lambda: relation(distance, other),
        lambda: relation(sympy.Abs(distance), other + of("per_head", h)),
        lambda: relation(Modulo(distance, block), 0),
        lambda: relation(FloorDiv(distance, block), 1),
        lambda: IsPowerOfTwo(FloorDiv(q, block) - FloorDiv(k, block)),
        lambda: IsPowerOfTwo(distance),
        lambda: sympy.Ne(of("padding", b, k), 0),
        lambda: sympy.Ne(of("padding", b, k) * of("padding", b, q), 0),
        lambda: sympy.Ne(of("pairs", b, sympy.Integer(0), q, k), 0),
        lambda: relation(of("levels", sympy.Integer(0), h, q, k), 0.5),
        lambda: sympy.Ne(of("blocks", h, FloorDiv(q, 8), FloorDiv(k, 8)), 0),
        lambda: sympy.Ne(of("blocks", h, FloorDiv(q + scalar("past"), 16), FloorDiv(k, 16)), 0),
        lambda: relation(of("grades", FloorDiv(q, 16), FloorDiv(k, 8)), 0.5),
        lambda: sympy.Ne(of("far", q - k + LONGEST), 0),
        lambda: sympy.Ne(of("band", q - k + LONGEST), 0),
        lambda: relation(of("steps", h, sympy.Abs(q - k)), of("kinds", b, k) + 1),
        lambda: relation(of("slopes", LONGEST - q + k), 0.01 * other),
        lambda: relation(draw(floats(q)), draw(floats(k))),
        lambda: relation(draw(floats(q)) + draw(floats(k)), 0.5 * h),
        lambda: relation(BitXor(q, k), other),
        lambda: relation(q * k, 300),
        lambda: relation(of("stamps", b, q) - of("stamps", b, k), 2),
    ]
    return draw(st.sampled_from(made))()


def rules():
    return st.recursive(
        atoms(),
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: sympy.And(*parts)),
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: sympy.Or(*parts)),
            inner.map(sympy.Not),
        ),
        max_leaves=5,
    )


def dense(rule, q_len: int, k_len: int, dtype=torch.float32) -> torch.Tensor:
    """The rule over the whole square: bool [B, H, Nq, Nk]."""
    symbols = {
        **SCALARS,
        **NUMBERS,
        "Nq": q_len,
        "Nk": k_len,
        "b": torch.arange(BATCH).view(-1, 1, 1, 1),
        "h": torch.arange(HEADS).view(-1, 1, 1),
        "q": torch.arange(q_len).view(-1, 1),
        "k": torch.arange(k_len),
    }
    found = boolean(torch.as_tensor(evaluate(rule, symbols, CAPTURES, dtype, "cpu")))
    return found.expand(BATCH, HEADS, q_len, k_len)


def of_blocks(kept: torch.Tensor, block_m: int, block_n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether a pair of blocks keeps some pair of tokens, whether it keeps all): bool [B, H, M, N]."""
    rows, columns = -kept.shape[2] % block_m, -kept.shape[3] % block_n

    def tiles(fill: bool) -> torch.Tensor:
        return F.pad(kept, (0, columns, 0, rows), value=fill).unflatten(3, (-1, block_n)).unflatten(2, (-1, block_m))

    return tiles(False).any(5).any(3), tiles(True).all(5).all(3)
