"""The portable target against the definition in float64: every plan, odd sizes, and never N x N memory."""

from __future__ import annotations

import pytest
import sympy
import torch
from comparing import assert_close
from plans import CASES, Call, Sizes, tensors
from sites import causal_site
from torch.utils._python_dispatch import TorchDispatchMode

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import Nk, Nq, b, k, load, q, s
from effattn.ir.plan import Plan
from effattn.lowering.forms import FORMS
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import portable
from effattn.runtime.targets.chunks import Walker, names_of_loads
from effattn.runtime.targets.portable import call as portable_call
from effattn.runtime.targets.portable.backward import run_backward

CPU = torch.device("cpu")


def check(call: Call, query, key, value, tolerance=None):
    out, lse = portable.run(call.plan, query, key, value, call.captures, call.scalars, call.numbers)
    wanted, wanted_lse = reference(call.plan, query, key, value, call.captures, call.scalars, call.numbers)
    assert out.shape == wanted.shape
    assert out.dtype == query.dtype
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert_close(out, wanted, tolerance, exact_dtype=False)
    assert_close(lse, wanted_lse, tolerance, exact_dtype=False)


@pytest.fixture(params=["flash", "strips", "products"])
def path(request, monkeypatch):
    """All ways of computing a call, at small sizes."""
    if request.param == "products":
        monkeypatch.setattr(portable_call.Call, "takes_flash_kernel", lambda self: False)
    if request.param == "strips":
        request.getfixturevalue("small_strips")
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_every_plan(name, path):
    sizes = Sizes(heads=6, kv_heads=2)
    check(CASES[name](sizes, CPU), *tensors(sizes))


@pytest.mark.parametrize("name", CASES)
def test_every_plan_in_small_pieces(name, path, monkeypatch):
    """Few rows at a time, and so small a budget that batches and heads are split as well."""
    monkeypatch.setattr(portable_call, "ROWS", 24)
    monkeypatch.setattr(portable_call, "SCORES", 3 * 5 * 60)
    sizes = Sizes(heads=6, kv_heads=2, q_len=65, k_len=65)
    check(CASES[name](sizes, CPU), *tensors(sizes))


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 1, 1, 1, 1, 64, 64),
        Sizes(1, 8, 1, 17, 17, 60, 60),
        Sizes(3, 4, 4, 257, 257, 64, 64),
        Sizes(1, 9, 3, 257, 257, 96, 64),
        Sizes(2, 3, 1, 17, 257, 128, 128),
        Sizes(2, 4, 2, 257, 17, 60, 60),
        Sizes(1, 4, 1, 1, 257, 64, 64),
        Sizes(4, 4, 2, 1, 33, 64, 64),
        Sizes(0, 4, 2, 9, 9, 16, 16),
        Sizes(1, 4, 2, 0, 9, 16, 16),
        Sizes(1, 4, 2, 9, 0, 16, 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["none", "causal_from_the_end", "window_and_sinks", "power_at_an_offset", "alibi"])
def test_sizes(name, sizes, path):
    check(CASES[name](sizes, CPU), *tensors(sizes))


@pytest.mark.parametrize("order", ["bnhd", "bhdn", "hbnd"])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_strides_in_and_out(order, layout, path):
    sizes = Sizes(heads=6, kv_heads=2)
    call = CASES["power_16"](sizes, CPU)
    call.plan = call.plan.dispatched(layout=layout)
    query, key, value = tensors(sizes, order=order)
    check(call, query, key, value)
    out, _ = portable.run(call.plan, query, key, value)
    assert (out if layout == "bhnd" else out.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "left_padding", "alibi", "soft_cap"])
def test_half_precision_rounds_once(name, dtype, path):
    sizes = Sizes(heads=6, kv_heads=2, q_len=100, k_len=100)
    call = CASES[name](sizes, CPU)
    made = tensors(sizes, dtype=dtype)
    # the definition sees the same rounded inputs: what is left is rounding of weights and of the output
    check(call, *made, tolerance=2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_float64_stays_float64(path):
    sizes = Sizes(heads=6, kv_heads=2)
    call = CASES["power_16"](sizes, CPU)
    made = tensors(sizes, dtype=torch.float64)
    out, _ = portable.run(call.plan, *made)
    assert_close(out, reference(call.plan, *made)[0], 1e-12)


@pytest.mark.parametrize("name", ["window", "power_16", "power_at_an_offset", "window_and_sinks"])
def test_a_decode_row_equals_the_row_of_a_prefill(name, path):
    form, params = (
        ("power", {"block": 16, "window": 32, "sinks": 16})
        if "power" in name
        else ("window", {"window": 13, "sinks": 5})
    )
    plan = plan_of(form, **params)
    query, key, value = tensors(Sizes(1, 6, 2, 150, 150, 64, 64))
    whole, whole_lse = portable.run(plan, query, key, value)
    for row in (0, 1, 15, 16, 99, 149):
        out, lse = portable.run(plan, query[:, :, row : row + 1], key[:, :, : row + 1], value[:, :, : row + 1])
        assert_close(out, whole[:, :, row : row + 1])
        assert_close(lse, whole_lse[:, :, row : row + 1])


def plan_of(form: str, position=q + Nk - Nq, scale=0.125, **params) -> Plan:
    kind = FORMS[form]
    return Plan(
        form,
        AttentionSpec(sympy.Float(scale) * s, k <= position, kind.keep(kind.params(**params), causal_site(position))),
    )


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (17, 17), (257, 257), (40, 257), (1, 257)])
@pytest.mark.parametrize(
    ("form", "params"),
    [
        ("exact", {}),
        ("window", {"window": 13, "sinks": 5}),
        ("window", {"window": 64, "sinks": 0}),
        ("power", {"block": 16, "window": 16, "sinks": 0}),
        ("power", {"block": 16, "window": 32, "sinks": 20}),
        ("power", {"block": 32, "window": 64, "sinks": 32}),
    ],
)
def test_forms_against_their_own_definitions(form, params, q_len, k_len):
    """The eager mask of a form, and SDPA: nothing of the expressions is used."""
    query, key, value = tensors(Sizes(2, 6, 2, q_len, k_len, 32, 32))
    rows = torch.arange(k_len - q_len, k_len)[:, None]
    columns = torch.arange(k_len)[None, :]
    kind = FORMS[form]
    mask = kind.reference(kind.params(**params), rows, columns) & (columns <= rows)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), attn_mask=mask, scale=0.125
    )
    out, _ = portable.run(plan_of(form, **params), query, key, value)
    assert_close(out, wanted)


@pytest.mark.parametrize(
    ("form", "params", "length"),
    [
        ("window", {"window": 200, "sinks": 0}, 200),
        ("window", {"window": 150, "sinks": 50}, 200),
        ("power", {"block": 16, "window": 64, "sinks": 0}, 80),
        ("power", {"block": 64, "window": 64, "sinks": 0}, 128),
    ],
)
def test_forms_equal_dense_where_they_should(form, params, length):
    query, key, value = tensors(Sizes(1, 2, 1, length, length, 32, 32))
    plan = plan_of(form, **params)
    out, lse = portable.run(plan, query, key, value)
    dense, dense_lse = portable.run(plan.dense(), query, key, value)
    assert_close(out, dense)
    assert_close(lse, dense_lse)


def test_a_form_differs_from_dense_where_it_should():
    query, key, value = tensors(Sizes(1, 2, 1, 200, 200, 32, 32))
    for plan in (
        plan_of("window", window=20, sinks=0),
        plan_of("power", block=16, window=16, sinks=0),
    ):
        out, _ = portable.run(plan, query, key, value)
        dense, _ = portable.run(plan.dense(), query, key, value)
        assert (out - dense).abs().max() > 1e-2


def test_power_windows_of_four_and_five_blocks_are_one_function():
    """Distance 4 is a power of two: a fifth window block adds nothing."""
    query, key, value = tensors(Sizes(1, 2, 1, 300, 300, 32, 32))
    four, _ = portable.run(plan_of("power", block=16, window=64, sinks=16), query, key, value)
    five, _ = portable.run(plan_of("power", block=16, window=80, sinks=16), query, key, value)
    six, _ = portable.run(plan_of("power", block=16, window=96, sinks=16), query, key, value)
    assert_close(four, five)
    assert (five - six).abs().max() > 1e-3


def on_a_device_without_values(*made):
    """Meta tensors: reading one on the host raises, as a GPU in a captured graph would."""
    return [tensor.to("meta") for tensor in made]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read_from_a_device(name):
    sizes = Sizes(heads=6, kv_heads=2)
    call = CASES[name](sizes, CPU)
    made, captures = on_a_device_without_values(*tensors(sizes)), on_a_device_without_values(*call.captures)
    out, lse = portable.run(call.plan, *made, captures, call.scalars, call.numbers)
    assert out.is_meta
    *grads, _ = run_backward(call.plan, out, lse, *made, out, lse, captures, call.scalars, call.numbers)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in made]


@pytest.mark.parametrize("name", CASES)
def test_bounds_that_only_a_device_knows(name, path, monkeypatch):
    """The same plans where no bound may look at data: more keys are visited, the answer is the same."""
    known = Walker._at
    monkeypatch.setattr(
        Walker, "_at", lambda self, bound, row: None if names_of_loads(bound) else known(self, bound, row)
    )
    sizes = Sizes(heads=6, kv_heads=2)
    check(CASES[name](sizes, CPU), *tensors(sizes))


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest result of any ATen call has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, min(tensor.numel(), stored))
        return result


@pytest.mark.parametrize(
    "name", ["none", "causal", "window_and_sinks", "power_16", "left_padding", "documents", "alibi", "soft_cap"]
)
def test_no_n_by_n_tensor(name, path, monkeypatch):
    monkeypatch.setattr(portable_call, "ROWS", 32)
    monkeypatch.setattr(portable_call, "SCORES", 2**16)
    sizes = Sizes(1, 4, 2, 1024, 1024, 16, 16)
    call = CASES[name](sizes, CPU)
    made = tensors(sizes)
    with LargestTensor() as largest:
        portable.run(call.plan, *made, call.captures, call.scalars, call.numbers)
    assert largest.elements <= max(2**16, 4 * 1024 * 16)
    assert largest.elements < 1024 * 1024 / 8


@pytest.mark.parametrize(
    ("form", "params", "most"),
    [
        ("exact", {}, 0.52),
        ("window", {"window": 256, "sinks": 64}, 0.11),
        ("power", {"block": 128, "window": 256, "sinks": 64}, 0.2),
    ],
)
def test_only_kept_keys_are_visited(form, params, most):
    length = 4096
    made = tensors(Sizes(1, 2, 1, length, length, 4, 4))
    call = portable_call.Call(plan_of(form, **params), *made, (), (), ())
    visited = sum(piece.chunk.keys * (piece.chunk.stop - piece.chunk.start) for piece in call.pieces())
    assert visited < most * length * length


@pytest.mark.parametrize("score", ["plain", "soft-cap"])
def test_documents_visit_their_own_keys(score):
    """Blocks of other documents are not read: what they hold does not matter, not even NaN."""
    places = torch.arange(300)
    document = torch.stack([places // 128, places // 64])
    raw = 0.25 * s if score == "plain" else 9 * sympy.tanh(s / 40)
    same = sympy.Eq(load("document", [b, q], integer=True), load("document", [b, k], integer=True))
    spec = AttentionSpec(raw, (k <= q) & same, captures=(CaptureSpec("document", "int64", 2),))
    plan = Plan("exact", spec)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 300, 16, generator=generator) for _ in range(3))
    walker = portable_call.Call(plan, query, key, value, [document], [], []).walker
    assert walker.runs(128, 192)[0].start == 128
    assert walker.runs(0, 300)[0].start == 0
    out, lse = portable.run(plan, query, key, value, [document])
    wanted, wanted_lse = reference(plan, query, key, value, [document])
    assert_close(out, wanted, exact_dtype=False)
    assert_close(lse, wanted_lse, exact_dtype=False)
    key[:, :, :128], value[:, :, :128] = torch.nan, torch.nan
    again, _ = portable.run(plan, query, key, value, [document])
    torch.testing.assert_close(again[:, :, 128:], out[:, :, 128:], atol=0, rtol=0)
