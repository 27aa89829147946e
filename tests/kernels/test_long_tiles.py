"""Keys that all later queries see: several programs share their queries, and their gradients are summed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from checking import check_gradients
from comparing import assert_close
from plans import CASES, Sizes, tensors

from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import Table, h, k, q, s
from effattn.ir.plan import Plan
from effattn.lowering.kernels.spec import KernelSpec, Tiles
from effattn.runtime.launching import forget
from effattn.runtime.targets import portable, triton
from effattn.runtime.targets.triton import backward
from effattn.runtime.targets.triton.specialise import long_tiles, splits_of_long

CPU = torch.device("cpu")
NAMES = ["wide_window_and_sinks", "power_at_an_offset"]


@pytest.fixture(params=[2, 7])
def shared(request, monkeypatch):
    """So many programs share a long tile, whatever its length; the tiles that were shared."""
    found = []

    def splits(spec, long, *sizes):
        found.append(long)
        return request.param if splits_of_long(replace(spec, groups=10**6), long, 1, *sizes[1:3], 10**6) > 1 else 1

    monkeypatch.setattr(backward, "splits_of_long", splits)
    forget()
    yield found
    forget()


@pytest.mark.parametrize(("q_len", "k_len", "groups"), [(70, 70, 2), (40, 90, 1), (50, 5, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(shared, name, q_len, k_len, groups):
    sizes = Sizes(heads=2 * groups, kv_heads=2, q_len=q_len, k_len=k_len, value_dim=24)
    check_gradients(CASES[name](sizes, CPU), tensors(sizes), config=Tiles(16, 16, 4, 1))
    assert max(shared) > 0


def by_head(sinks: int) -> Plan:
    near = q - k < Table(h, 5, 20, 9, 30)
    return Plan("exact", AttentionSpec(0.3 * s, (k <= q) & sympy.Or(near, k < sinks)))


@pytest.mark.parametrize("plan", [by_head(20), by_head(60)], ids=["a window for each head", "many tiles"])
def test_bits_are_the_same_in_every_run(shared, plan):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 80, 16, generator=generator) for heads in (4, 2, 2))
    out, lse = triton.run(plan, query, key, value)
    given = (torch.randn(out.shape, generator=generator), None, query, key, value, out, lse)
    one, other = (triton.run_backward(plan, *given, config=Tiles(16, 16, 4, 1))[:3] for _ in range(2))
    for first, second, wanted in zip(one, other, portable.run_backward(plan, *given)[:3], strict=True):
        assert torch.equal(first, second)
        assert_close(first, wanted)


def spec_of(plan: Plan, groups: int, block_m: int) -> KernelSpec:
    return KernelSpec("backward", "exact", plan.spec, "bfloat16", 64, 64, groups, Tiles(block_m, 64, 4, 2))


def test_how_many_programs():
    """So many that the machine is full; one where tiles are short, or fill it by themselves."""
    plan = by_head(100)
    assert [long_tiles(spec_of(plan, 4, size)) for size in (128, 64, 32, 16)] == [1, 2, 4, 0]
    assert long_tiles(spec_of(by_head(0), 4, 128)) == 0
    one = spec_of(plan, 4, 128)
    lengths = (131072, 131072)
    assert splits_of_long(one, 1, 8, *lengths, 132) == 16
    assert splits_of_long(one, 1, 1, *lengths, 132) == 32
    assert splits_of_long(one, 1, 100, *lengths, 132) == 1
    assert splits_of_long(one, 0, 1, *lengths, 132) == 1
    assert splits_of_long(one, 1, 1, 512, 131072, 132) == 1
    assert splits_of_long(spec_of(plan, 4, 64), 2, 1, 131072, 60, 132) == 1
