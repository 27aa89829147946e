"""The op: its schema, its compilation, its choice of target, and what it refuses."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from comparing import assert_close
from plans import CASES, Call, Sizes, tensors
from sites import causal_site

import effattn.runtime.ops  # noqa: F401  (registers torch.ops.effattn)
from effattn.errors import PlanError, TargetError
from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import IntLoad, b, k, load, number, q, s, scalar
from effattn.ir.plan import Dispatch, Plan
from effattn.ir.refusal import Why
from effattn.lowering.forms import FORMS
from effattn.runtime import launching
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import choice as targets
from effattn.runtime.targets import portable, sdpa, triton
from effattn.runtime.targets.triton import limits

CPU = torch.device("cpu")
PADDING = load("padding", [b, k], integer=True)


@pytest.fixture(autouse=True)
def nothing_remembered():
    launching.forget()


def everything() -> Call:
    """A plan with a tensor, an integer and a float."""
    plan = Plan(
        "exact",
        AttentionSpec(
            number("scale") * s,
            (k <= q + scalar("past")) & _kept(PADDING),
            captures=(CaptureSpec("padding", "bool", 2),),
            scalars=("past",),
            numbers=("scale",),
        ),
        dispatch=Dispatch(layout="bnhd"),
    )
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :9] = False
    return Call(plan, [padding], [7], [0.125])


def _kept(term: IntLoad):
    import sympy

    return sympy.Ne(term, 0)


def attend_with(call: Call, query, key, value):
    return torch.ops.effattn.attend(query, key, value, call.captures, call.scalars, call.numbers, call.plan.encode())


@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    call = everything()
    made = [tensor.requires_grad_(needs_grad) for tensor in tensors(Sizes(2, 6, 2, 33, 40, 16, 8), order="bnhd")]
    args = (*made, call.captures, call.scalars, call.numbers, call.plan.encode())
    torch.library.opcheck(torch.ops.effattn.attend.default, args)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_opcheck_of_the_backward(layout):
    sizes = Sizes(2, 6, 2, 33, 40, 16, 8)
    plan = CASES["causal"](sizes, CPU).plan.dispatched(layout=layout)
    query, key, value = tensors(sizes)
    out, lse = attend_with(Call(plan), query, key, value)
    args = (torch.randn_like(out), None, query, key, value, out, lse, [], [], [], plan.encode(), [])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.effattn.attend_backward.default, args, test_utils=tests)
    call = CASES["alibi"](sizes, CPU)
    out, lse = attend_with(call, query, key, value)
    args = (out, None, query, key, value, out.clone(), lse, call.captures, [], [], call.plan.encode(), [True])
    torch.library.opcheck(torch.ops.effattn.attend_backward.default, args, test_utils=tests)


def test_opcheck_with_a_learned_tensor():
    """Of two captured tensors, one is learned."""
    sizes = Sizes(2, 6, 2, 33, 33, 16, 8)
    call = CASES["alibi"](sizes, CPU)
    spec = replace(
        call.plan.spec,
        predicate=call.plan.spec.predicate & _kept(PADDING),
        captures=(CaptureSpec("padding", "bool", 2), *call.plan.spec.captures),
    )
    plan, padding = replace(call.plan, spec=spec), torch.ones(2, 33, dtype=torch.bool)
    made = [tensor.requires_grad_() for tensor in tensors(sizes)]
    args = (*made, [padding, call.captures[0].requires_grad_()], [], [], plan.encode())
    torch.library.opcheck(torch.ops.effattn.attend.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_gradients(backend, dynamic):
    """Strides of the fake kernel are asserted by Inductor; a scale may be ``item()`` of a tensor."""
    call = everything()
    text = call.plan.encode()

    def block(query, key, value, padding, scale):
        past = key.shape[2] - query.shape[2]
        out, _ = torch.ops.effattn.attend(query * 2, key, value, [padding], [past], [scale.item()], text)
        return out.transpose(1, 2).reshape(query.shape[0], query.shape[2], -1) + 1

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
        for q_len, k_len in ((33, 40), (21, 29), (50, 51)) if dynamic else ((33, 40),):
            made = [tensor.requires_grad_() for tensor in tensors(Sizes(2, 6, 2, q_len, k_len, 16, 8))]
            rest = (torch.rand(2, k_len) > 0.2, torch.tensor(0.2))
            expected, found = block(*made, *rest), compiled(*made, *rest)
            assert_close(found, expected)
            weights = torch.randn_like(expected)
            for got, wanted in zip(
                torch.autograd.grad(found, made, weights), torch.autograd.grad(expected, made, weights), strict=True
            ):
                assert_close(got, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_computed_scale_does_not_specialise_the_size():
    plan = Plan("exact", AttentionSpec(number("scale") * s, k <= q, numbers=("scale",))).encode()

    def block(query, key, value):
        return torch.ops.effattn.attend(query, key, value, [], [], [1 / math.sqrt(query.shape[3])], plan)[0]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for dim in (16, 24, 32):  # no two sizes the same: torch would take them for one
        made = tensors(Sizes(3, 4, 2, 20, 21, dim, 12))
        assert_close(compiled(*made), block(*made))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_length_decides_when_the_op_runs():
    """One compiled graph: short inputs are dense, long ones take the form."""
    window = FORMS["window"]
    keep = window.keep(window.params(window=8, sinks=0), causal_site())
    plan = Plan("window", AttentionSpec(0.25 * s, k <= q, keep), dispatch=Dispatch(min_length=50))
    text = plan.encode()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda *made: torch.ops.effattn.attend(*made, [], [], [], text)[0],
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for length, form in ((49, plan.dense()), (50, plan), (51, plan)):
        made = tensors(Sizes(1, 2, 1, length, length))
        assert_close(compiled(*made), reference(form, *made, dtype=torch.float32)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_length_decides_for_the_gradient_too():
    window = FORMS["window"]
    plan = Plan(
        "window",
        AttentionSpec(0.25 * s, k <= q, window.keep(window.params(window=8, sinks=0), causal_site())),
        dispatch=Dispatch(min_length=50),
    )
    made = [tensor.double().requires_grad_() for tensor in tensors(Sizes(1, 2, 1, 40, 40))]
    out, _ = attend_with(Call(plan), *made)
    wanted, _ = reference(plan.dense(), *made)
    for got, expected in zip(
        torch.autograd.grad(out.sum(), made), torch.autograd.grad(wanted.sum(), made), strict=True
    ):
        assert_close(got, expected, 1e-6)  # the LSE is in float32


@pytest.mark.parametrize("length", [300, 257])
@pytest.mark.parametrize("name", ["none", "causal", "causal_from_the_end", "scale_at_run_time"])
def test_dense_plans_take_sdpa(name, length, monkeypatch):
    sizes = Sizes(2, 6, 2, length, length, 20, 20)
    call = CASES[name](sizes, CPU)
    monkeypatch.setattr(portable, "run", None)
    for layout in ("bhnd", "bnhd"):
        call.plan = call.plan.dispatched(layout=layout)
        made = tensors(sizes, order="bnhd")
        out, lse = attend_with(call, *made)
        wanted, wanted_lse = reference(call.plan, *made, numbers=call.numbers)
        assert_close(out, wanted, exact_dtype=False)
        assert_close(lse, wanted_lse, exact_dtype=False)
        assert (out if layout == "bhnd" else out.transpose(1, 2)).is_contiguous()
        assert lse.is_contiguous()


def test_what_sdpa_would_get_wrong_is_kept_from_it():
    sizes = {"Nq": 5, "Nk": 9}
    assert sdpa.dense_kind(k <= q, sizes) is None
    assert sdpa.dense_kind(k <= q + 4, sizes) is None
    assert sdpa.dense_kind(k <= q + 8, sizes) == "all"
    assert sdpa.dense_kind(k < q, {"Nq": 9, "Nk": 9}) is None
    assert sdpa.dense_kind(k <= 2 * q, {"Nq": 9, "Nk": 9}) is None
    assert sdpa.dense_kind((k <= q) & (q - k < 8), {"Nq": 9, "Nk": 9}) is None
    assert sdpa.dense_kind((k <= q) & (q - k < 9), {"Nq": 9, "Nk": 9}) == "causal"
    assert sdpa.dense_kind((k <= q) & _kept(PADDING), {"Nq": 9, "Nk": 9}) is None
    assert sdpa.dense_kind(k <= q + load("live", [], integer=True), {"Nq": 9, "Nk": 9}) is None
    for name in ("negative_scale", "negative_scale_at_run_time", "zero_scale_at_run_time"):
        call = CASES[name](Sizes(1, 2, 1, 300, 300), CPU)
        made = tensors(Sizes(1, 2, 1, 300, 300))
        assert sdpa.dense(call.plan, *made).run(*made, call.scalars, call.numbers) is None
    for score in (s * s, s + 1, s * q):
        assert sdpa.dense(Plan("exact", AttentionSpec(score, k <= q)), *made) is None


def test_a_scalar_decides_in_every_call_whether_sdpa_computes_it():
    plan = Plan(
        "exact", AttentionSpec(number("scale") * s, k <= q + scalar("past"), scalars=("past",), numbers=("scale",))
    )
    made = tensors(Sizes(1, 2, 1, 300, 300))
    for past, scale, dense in ((0, 0.2, True), (7, 0.2, False), (299, 0.2, True), (0, -0.2, False), (0, 0.3, True)):
        found = sdpa.dense(plan, *made).run(*made, [past], [scale])
        assert (found is not None) == dense
        out, lse = attend_with(Call(plan, [], [past], [scale]), *made)
        wanted, wanted_lse = reference(plan, *made, [], [past], [scale])
        assert_close(out, wanted, exact_dtype=False)
        assert_close(lse, wanted_lse, exact_dtype=False)


def test_settings_of_the_user_that_exclude_sdpas_kernel_hold_in_every_call(monkeypatch):
    plan = Plan("exact", AttentionSpec(0.25 * s, k <= q))
    made = tensors(Sizes(1, 2, 1, 300, 300))
    wanted, _ = attend_with(Call(plan), *made)
    excluded = replace(sdpa.KERNELS["host"], run=lambda *call: None)
    monkeypatch.setitem(sdpa.KERNELS, "host", excluded)
    launching.forget()
    for _ in range(2):
        assert_close(attend_with(Call(plan), *made)[0], wanted)


def test_every_target_that_a_plan_may_name():
    made = tensors(Sizes(1, 2, 1, 20, 20))
    plan = Plan("exact", AttentionSpec(0.25 * s, k <= q))
    wanted, _ = attend_with(Call(plan), *made)
    for target in ("portable", "triton"):  # Triton runs on its interpreter here
        out, _ = attend_with(Call(plan.dispatched(target=target)), *made)
        assert_close(out, wanted)


def test_without_triton_a_gpu_gets_the_portable_target_and_it_is_said_once(monkeypatch):
    monkeypatch.setattr(limits, "triton_is_importable", lambda: False)
    monkeypatch.setattr("effattn.settings._told", set())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            assert targets.serving(None, "cuda", lambda target: None) is portable
    assert ["Triton is not installed" in str(warning.message) for warning in told] == [True]


@pytest.mark.parametrize("rule", [Why.NO_TRITON, Why.DEVICE])
def test_kernels_asked_for_where_none_can_run(monkeypatch, rule):
    if rule == Why.NO_TRITON:
        monkeypatch.setattr(limits, "triton_is_importable", lambda: False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    refusal = triton.why_not_on("cpu")
    assert refusal.rule == rule
    assert targets.chosen("triton", "cpu", lambda target: None) == (portable, refusal)
    reason = re.escape(str(refusal))
    made = tensors(Sizes(1, 2, 1, 20, 20))
    plan = Plan("exact", AttentionSpec(0.25 * s, k <= q), dispatch=Dispatch(target="triton"))
    with pytest.raises(TargetError, match=reason):
        attend_with(Call(plan), *made)
    with pytest.raises(TargetError, match=reason):
        torch.ops.effattn.linear(*made, target="triton")
    q_, k_, v_ = made
    for function in (softmax_attention, linear_attention):
        compiled = torch.compile(function, backend="effattn", options={"target": "triton", "rest": "eager"})
        with pytest.raises(TargetError, match=reason):
            compiled(q_, k_, v_)


def softmax_attention(q_, k_, v_):
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(3)
    return (q_ @ k_.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v_


def linear_attention(q_, k_, v_):
    return (q_ @ k_.mT).tril() @ v_


def test_a_case_without_a_kernel_runs_portably():
    made = tensors(Sizes(1, 2, 1, 20, 20), dtype=torch.float64)
    plan = Plan("exact", AttentionSpec(0.25 * s, k <= q), dispatch=Dispatch(target="triton"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, _ = attend_with(Call(plan), *made)
    assert_close(out, reference(plan, *made)[0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 4, 8)), "do not fit"),
        (((1, 2, 5, 8), (1, 2, 5, 4), (1, 2, 5, 4)), "do not fit"),
        (((2, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)), "do not fit"),
        (((1, 3, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)), "not a multiple"),
        (((2, 5, 8), (2, 5, 8), (2, 5, 8)), "must be"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        attend_with(Call(Plan("exact", AttentionSpec(s))), *(torch.zeros(shape) for shape in shapes))


def test_a_wrong_number_of_tensors():
    with pytest.raises(ValueError, match="takes 1 tensors, got 0"):
        attend_with(replace(everything(), captures=[]), *tensors(Sizes(2, 6, 2, 33, 40)))


def test_a_plan_that_is_none():
    with pytest.raises(PlanError):
        torch.ops.effattn.attend(*tensors(Sizes()), [], [], [], "{}")


def test_importing_registers_once_and_is_light():
    code = (
        "import sys, importlib, torch, effattn.runtime.ops as ops;"
        "assert 'triton' not in sys.modules; homes = [getattr(ops, name) for name in ops.__all__];"
        "assert all(hasattr(torch.ops.effattn, name) for home in homes for name in home.OPS);"
        "importlib.reload(ops.attend);"
        "q = torch.randn(1, 2, 8, 4); from effattn.ir.plan import Plan; from effattn.ir import expr;"
        "from effattn.ir.attention import AttentionSpec;"
        "torch.ops.effattn.attend(q, q, q, [], [], [], Plan('exact', AttentionSpec(expr.s)).encode()); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


def test_what_lies_askew_is_copied_for_kernels_on_a_gpu():
    """A step to a next row of 1 is looked at, also where there is one row; contiguous() does not."""
    key = torch.randn(2, 3, 8, 1).transpose(2, 3)
    for askew in (key, torch.randn(2, 3, 8, 5).transpose(2, 3), torch.randn(2, 3, 5, 9)[..., :8]):
        copy = sdpa.aligned(askew)
        assert torch.equal(copy, askew)
        assert copy.stride() == (copy.shape[2] * 24, copy.shape[2] * 8, 8, 1)
    for straight in (torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(1, 1, 5, 8).expand(2, 3, 5, 8)):
        assert sdpa.aligned(straight) is straight


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_takes_the_gradients_of_captured_tensors(dynamic):
    """The backward returns as many as need one."""
    sizes = Sizes(2, 6, 2, 33, 33, 16, 8)
    call = CASES["alibi"](sizes, CPU)
    spec = replace(
        call.plan.spec,
        predicate=call.plan.spec.predicate & _kept(PADDING),
        captures=(CaptureSpec("padding", "bool", 2), *call.plan.spec.captures),
    )
    text = replace(call.plan, spec=spec).encode()

    def block(query, key, value, padding, slopes):
        return torch.ops.effattn.attend(query, key, value, [padding, slopes * 2], [], [], text)[0] + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="inductor", fullgraph=True, dynamic=dynamic)
    made = [tensor.requires_grad_() for tensor in tensors(sizes)]
    slopes = call.captures[0].clone().requires_grad_()
    given = (*made, torch.rand(2, 33) > 0.2, slopes)
    expected, found = block(*given), compiled(*given)
    weights = torch.randn_like(expected)
    leaves = [*made, slopes]
    assert_close(torch.autograd.grad(found, leaves, weights), torch.autograd.grad(expected, leaves, weights))
