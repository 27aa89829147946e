"""Dropout: both targets drop the same weights, those that the definition drops, whatever their tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from checking import check, check_gradients
from comparing import assert_close
from plans import CASES, Call, Sizes, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from effattn.errors import PlanError
from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import s
from effattn.ir.plan import Plan
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime import ops, philox  # noqa: F401 (registers the op)
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import portable
from effattn.runtime.targets import triton as triton_target
from effattn.runtime.targets.portable import call as portable_call

CPU, SEED = torch.device("cpu"), 2**61 + 2**33 + 12345
WORD = 2**32 - 1
MASKS = (
    *("causal", "right_padding", "documents", "soft_cap", "bias", "bias_by_distance", "power_at_an_offset"),
    *("window_per_head", "empty_rows_nan", "empty_rows_mean", "empty_rows_uniform", "empty_rows_uniform_and_learned"),
)
MORE = ("none", "window_and_sinks", "alibi", "power_16", "empty_rows_zero", "opaque_mask", "scale_at_run_time")


def with_dropout(name: str, sizes: Sizes, p: float = 0.3, seed: int = SEED) -> Call:
    call = CASES[name](sizes, CPU)
    spec = replace(call.plan.spec, dropout=p).seeded
    return Call(replace(call.plan, spec=spec), [*call.captures, torch.tensor(seed)], call.scalars, call.numbers)


def number(seed: int, query: int, key: int, pair: int) -> int:
    """The random number of one weight, in Python's integers."""
    c = [query // 16 * 8 + query % 8, key // 32 * 8 + key % 8, pair, 0]
    k = [seed & WORD, seed >> 32 & WORD]
    for _ in range(7):
        low, high = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [high >> 32 ^ c[1] ^ k[0], high & WORD, low >> 32 ^ c[3] ^ k[1], low & WORD]
        k = [k[0] + 0x9E3779B9 & WORD, k[1] + 0xBB67AE85 & WORD]
    return c[2 * (query >> 3 & 1) + (key >> 3 & 1)] >> 16 * (key >> 4 & 1) & 0xFFFF


def test_known_answers():
    """Of Philox 4x32-7, from its authors' Random123."""
    known = ((0, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),)
    known += ((-1, WORD, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),)
    for seed, counter, words in known:
        found = philox.philox(torch.tensor(seed), *[torch.tensor(counter)] * 4)
        assert tuple(map(int, found)) == words


@pytest.mark.parametrize("seed", [0, SEED, -7])
def test_which_weights_are_kept(seed):
    """Far places too: nothing is computed modulo 2**32 elements."""
    spec = replace(AttentionSpec(s), dropout=0.3)
    least, pairs = round(0.3 * 2**16), (0, 5, 2**31 + 3)
    for rows, keys in ((range(5, 38), range(17, 50)), (range(2**31 - 3, 2**31 + 3), range(2**30 + 9, 2**30 + 50))):
        found = philox.kept(
            torch.tensor(seed),
            spec.least_kept,
            torch.tensor(pairs).view(-1, 1, 1),
            (rows.start, rows.stop),
            [(keys.start, keys.start + 9), (keys.start + 9, keys.stop)],
        )
        # compared as signed numbers, so that no kernel needs unsigned ones
        expected = [[[number(seed, q, k, pair) ^ 2**15 >= least for k in keys] for q in rows] for pair in pairs]
        assert found.tolist() == expected


@pytest.mark.parametrize("name", MASKS)
def test_kernels(name):
    sizes = Sizes(heads=3, q_len=37, k_len=37)
    call, inputs = with_dropout(name, sizes), tensors(sizes)
    check(call, *inputs, config=Tiles(32, 16, 4, 1))
    check_gradients(call, inputs, config=Tiles(16, 32, 4, 1))


@pytest.mark.parametrize("small", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", MASKS + MORE)
def test_portable(name, small, monkeypatch):
    if small:
        monkeypatch.setattr(portable_call, "ROWS", 24)
        monkeypatch.setattr(portable_call, "SCORES", 16 * 3 * 24 * 57)
    sizes = Sizes(heads=6, kv_heads=2, head_dim=12, value_dim=8)
    call = with_dropout(name, sizes)
    inputs = [tensor.double().requires_grad_() for tensor in tensors(sizes)]
    learned = [load.double().requires_grad_() if load.is_floating_point() else load for load in call.captures]
    leaves = [*inputs, *(load for load in learned if load.requires_grad)]
    given = (learned, call.scalars, call.numbers)
    wanted, wanted_lse = reference(call.plan, *inputs, *given)
    out, lse = torch.ops.effattn.attend(*inputs, *given, call.plan.encode())
    assert_close(out, wanted, 1e-9)
    assert_close(lse, wanted_lse, 1e-6, exact_dtype=False)
    weights = torch.randn_like(wanted)
    found, expected = (
        torch.autograd.grad((torch.nan_to_num(each) * weights).sum(), leaves, allow_unused=True)
        for each in (out, wanted)
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, torch.zeros_like(one) if other is None else other, 1e-6)


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 57), (17, 1), (1, 1), (33, 17), (17, 257), (257, 33)])
def test_sizes(q_len, k_len):
    sizes = Sizes(batch=1, heads=3, kv_heads=1, q_len=q_len, k_len=k_len, head_dim=20, value_dim=12)
    call, inputs = with_dropout("none", sizes, 0.5), tensors(sizes)
    check(call, *inputs)
    check_gradients(call, inputs, config=Tiles(64, 64, 4, 1))
    out, _ = portable.run(call.plan, *inputs, call.captures)
    assert_close(out, reference(call.plan, *inputs, call.captures)[0], exact_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    sizes = Sizes(heads=2, kv_heads=1)
    check(with_dropout("causal", sizes), *tensors(sizes, dtype=dtype))


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest result of any ATen call has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("name", ["causal", "empty_rows_mean"])
def test_no_n_by_n_tensor(name, monkeypatch):
    monkeypatch.setattr(portable_call, "ROWS", 32)
    monkeypatch.setattr(portable_call, "SCORES", 2**19)
    sizes = Sizes(1, 4, 2, 1024, 1024)
    call, inputs = with_dropout(name, sizes), tensors(sizes)
    with LargestTensor() as largest:
        out, lse = portable.run(call.plan, *inputs, call.captures)
        portable.run_backward(call.plan, out, None, *inputs, out, lse, call.captures)
    assert largest.elements <= max(8 * 32 * 1024, 4 * 1024 * 16)


def ones(p: float, seed: int, sizes: Sizes) -> torch.Tensor:
    """Which weights are kept, from an attention whose values are a unit matrix: bool [B, H, Nq, Nk]."""
    spec = replace(AttentionSpec(s * 0), dropout=p).seeded
    query = torch.zeros(sizes.batch, sizes.heads, sizes.q_len, 1)
    value = torch.eye(sizes.k_len).expand(sizes.batch, sizes.heads, -1, -1)
    key = torch.zeros(*value.shape[:3], 1)
    out, _ = portable.run(Plan("exact", spec), query, key, value, [torch.tensor(seed)])
    assert_close(out[out != 0], torch.full_like(out[out != 0], spec.kept_scale / sizes.k_len))
    return out != 0


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 1 - 2**-10])
def test_how_many_are_kept(p):
    kept = ones(p, 1, Sizes(batch=4, heads=4, q_len=128, k_len=128)).double()
    for count, share in (
        (kept.numel(), kept.mean()),
        (16 * 128, kept.mean((0, 1, 2))),
        (16 * 128, kept.mean((0, 1, 3))),
    ):
        off = (share - (1 - p)).abs().max() / math.sqrt(p * (1 - p) / count)
        assert off < (5.5 if count * p * (1 - p) > 50 else 12)


def test_independent():
    """Between seeds, batches, heads, queries and keys, also those that share a call of Philox."""
    sizes = Sizes(batch=2, heads=2, q_len=128, k_len=128)
    kept = [ones(0.5, seed, sizes).double() - 0.5 for seed in (1, 2, 1 + 2**32)]
    one = kept[0]
    pairs = [(one, other) for other in kept[1:]] + [(one[0], one[1]), (one[:, 0], one[:, 1])]
    for dim in (2, 3):
        pairs += [(one.narrow(dim, 0, 128 - by), one.narrow(dim, by, 128 - by)) for by in (1, 2, 4, 8, 16, 64)]
    pairs += [(one, one.mT), (one[:, :, 8:, 8:], one[:, :, :-8, :-8]), (one[:, :, 8:, :-8], one[:, :, :-8, 8:])]
    for first, second in pairs:
        assert abs((first * second).mean() * 4) < 5.5 / math.sqrt(first.numel())


def test_one_seed_in_every_tile_and_target():
    sizes = Sizes(batch=1, heads=2, kv_heads=2, q_len=70, k_len=90)
    call, (query, key, value) = with_dropout("none", sizes, 0.5), tensors(sizes)
    wanted, _ = portable.run(call.plan, query, key, value, call.captures)
    for tiles in (Tiles(16, 16, 4, 1), Tiles(64, 32, 4, 1), Tiles(32, 128, 4, 1)):
        out, _ = triton_target.run(call.plan, query, key, value, call.captures, config=tiles)
        assert_close(out, wanted)
    other, _ = portable.run(call.plan, query, key, value, [torch.tensor(SEED + 1)])
    assert (other - wanted).abs().max() > 0.01


def test_the_mean_is_attention_without_dropout():
    sizes = Sizes(batch=1, heads=1, kv_heads=1, q_len=20, k_len=20)
    inputs = [tensor.requires_grad_() for tensor in tensors(sizes)]
    weights = torch.randn(1, 1, 20, 16, generator=torch.Generator().manual_seed(3))

    def gradients(call: Call) -> torch.Tensor:
        out, _ = torch.ops.effattn.attend(*inputs, call.captures, [], [], call.plan.encode())
        grads = torch.autograd.grad((out * weights).sum(), inputs)
        return torch.cat([each.detach().flatten() for each in (out, *grads)])

    found = torch.stack([gradients(with_dropout("causal", sizes, 0.3, seed)) for seed in range(400)])
    error = (found.mean(0) - gradients(CASES["causal"](sizes, CPU))) / (found.std(0) / 20 + 1e-4)
    assert error.abs().mean() < 1.0
    assert error.abs().max() < 6.0


def test_a_plan_needs_its_seed_and_a_probability():
    plan = with_dropout("causal", Sizes()).plan
    assert Plan.decode(plan.encode()) == plan
    for wrong in (replace(plan.spec, captures=()), replace(plan.spec, dropout=1.0)):
        with pytest.raises(PlanError, match="dropout"):
            Plan.decode(replace(plan, spec=wrong).encode())
