"""Predicates that leave 32 bits, and some that do not; run as a script, it compiles them for a GPU."""

from __future__ import annotations

import json
import re
import sys

import sympy
import torch
from plans import CAUSAL, Call, Sizes

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import FloorDiv, Modulo, Nk, Nq, Where, b, k, load, q, s, scalar
from effattn.ir.plan import Plan
from effattn.lowering.kernels.spec import KernelSpec, Tiles

SIZES = Sizes(2, 2, 1, 45, 50)
FAR = 50_000_017
IDS = load("ids", [b, k], integer=True)
ROW_IDS = load("row_ids", [b, q], integer=True)
past = scalar("past")

# name -> (predicate, dtypes of the data that it reads)
ATOMS: dict[str, tuple] = {
    "product": (Modulo(q * FAR + k * 7, 97) < 60, {}),
    "product of keys alone": (Modulo(k * FAR, 97) < 60, {}),
    "product below zero": (Modulo(q * 7 - k * FAR, 97) < 60, {}),
    "division below zero": (sympy.Eq(Modulo(FloorDiv(-k * FAR, 1000), 3), 0), {}),
    "division by a power of two": (sympy.Eq(Modulo(FloorDiv(k * FAR - q, 1 << 20), 4), 1), {}),
    "remainder of a power of two": (Modulo(k * FAR * 3, 1 << 33) < 1 << 32, {}),
    "remainder of a large number": (Modulo(-k * FAR, 2_000_000_011) < 1_000_000_000, {}),
    "compared with a large number": (k * FAR * 3 > 3_000_000_000, {}),
    "constant of 33 bits": (Modulo(k + 6_000_000_000, 7) < 5, {}),
    "distance of products": (sympy.Abs(q * FAR * 2 - k * FAR * 3) < 40 * FAR, {}),
    "least of two products": (Modulo(sympy.Min(q * FAR * 2, k * FAR * 3), 1009) < 600, {}),
    "chosen product": (Modulo(Where(k < q, k * FAR * 3, q * 5), 101) < 70, {}),
    "square": (Modulo((q * 10_007) ** 2 - k, 13) < 8, {}),
    "flat index of a table": (sympy.Ne(load("kept", [Modulo(q * FAR + k, 64)], integer=True), 0), {"kept": "bool"}),
    "int32 data times position": (Modulo(IDS * q, 89) < 50, {"ids": "int32"}),
    "int32 data times int32 data": (Modulo(IDS * ROW_IDS, 89) < 50, {"ids": "int32", "row_ids": "int32"}),
    "difference of int32 data": (ROW_IDS - IDS < 0, {"ids": "int32", "row_ids": "int32"}),
    "int64 data": (ROW_IDS - IDS * 3 < 5, {"ids": "int64", "row_ids": "int64"}),
    "int32 data beside int64 data": (IDS < ROW_IDS, {"ids": "int32", "row_ids": "int64"}),
    "int16 data": (Modulo(IDS * 100_003, 89) < 50, {"ids": "int16"}),
    "uint8 data": (Modulo(IDS * 10_000_019 - q, 89) < 50, {"ids": "uint8"}),
    "scalar times position": (Modulo(past * k, 89) < 50, {}),
}
# predicates of which nothing needs more than 32 bits
NARROW = {
    "causal": CAUSAL,
    "from the end": sympy.Le(k, q + Nk - Nq),
    "window from the end": q + Nk - Nq - k < 4096,
    "chunks": sympy.And(CAUSAL, sympy.Ge(FloorDiv(k, 24), FloorDiv(q, 24))),
    "past": sympy.Le(k, q + past),
    "every third": sympy.Eq(Modulo(q - k, 3), 0),
    "dilated": sympy.And(sympy.Abs(q - k) < 40, sympy.Eq(Modulo(q, 4), Modulo(k, 4))),
}


def plan_of(name: str) -> Plan:
    predicate, dtypes = ATOMS[name]
    captures = tuple(CaptureSpec(load, dtype, 1 if load == "kept" else 2) for load, dtype in dtypes.items())
    return Plan("exact", AttentionSpec(SIZES.scale * s, predicate, captures=captures, scalars=("past",)))


def call_of(name: str, sizes: Sizes) -> Call:
    plan = plan_of(name)
    draw = torch.Generator().manual_seed(4)
    captures = []
    for spec in plan.spec.captures:
        dtype = getattr(torch, spec.dtype)
        if spec.name == "kept":
            captures.append(torch.rand(64, generator=draw) < 0.6)
            continue
        size = (sizes.batch, sizes.q_len if spec.name == "row_ids" else sizes.k_len)
        limit = min(torch.iinfo(dtype).max, 2**31 - 1 if dtype == torch.int32 else 2**40)
        low = 0 if dtype == torch.uint8 else -limit
        captures.append(torch.randint(low, limit, size, generator=draw, dtype=torch.int64).to(dtype))
    return Call(plan, captures, [2**27 + 12_345])


def atom_spec(what: str | Plan) -> KernelSpec:
    plan = plan_of(what) if isinstance(what, str) else what
    return KernelSpec("prefill", plan.form, plan.spec, "float32", 16, 16, 2, Tiles(16, 16, 4, 1))


def types_of(ttir: str) -> list[str]:
    """Types of integers that are compared, divided, subtracted, shifted: what offsets into tensors are not."""
    operations = "cmpi|remsi|divsi|subi|shrsi|minsi|maxsi|andi"
    return sorted(set(re.findall(rf"arith\.(?:{operations})\b[^\n]*: (?:tensor<[0-9x]*x)?(i32|i64)\b", ttir)))


def main() -> None:
    from effattn.lowering.kernels.offline import compiled_for

    named = {name: atom_spec(name) for name in ATOMS}
    named |= {
        f"narrow: {name}": atom_spec(Plan("exact", AttentionSpec(0.25 * s, NARROW[name], scalars=("past",))))
        for name in NARROW
    }
    print(json.dumps({name: types_of(compiled_for(spec, "sm90").asm["ttir"]) for name, spec in named.items()}))


if __name__ == "__main__":
    sys.exit(main())
