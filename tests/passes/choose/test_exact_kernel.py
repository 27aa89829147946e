"""Exact attention that SDPA's kernels compute too: theirs, or a generated one where it is faster or asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close

import effattn
from effattn.errors import PlanError
from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import k, q, s
from effattn.ir.plan import Dispatch, Plan
from effattn.lowering.device import DEVICE_TYPES
from effattn.lowering.schedules import exact
from effattn.lowering.schedules.exact import Faster, generated_is_faster
from effattn.runtime import launching
from effattn.runtime.targets import sdpa, triton

HERE = Faster("interpreter", ("causal",), ("float32",), (16, 64), queries=300)


@pytest.fixture
def kernels_here(monkeypatch):
    """A CPU whose own target is the generated kernels."""
    monkeypatch.setitem(DEVICE_TYPES, "cpu", replace(DEVICE_TYPES["cpu"], target="triton"))
    launching.forget()
    yield
    launching.forget()


def causal(q_, k_, v_):
    return F.scaled_dot_product_attention(q_, k_, v_, is_causal=True)


def tensors(length=300, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, dim, generator=generator).to(dtype) for _ in range(3)]


def route(made, kernel="auto", grad=False, **options):
    """The form's route at the one site of ``causal``, and what it computed."""
    policy = {"rule": [{"forms": ["exact"], "params": {"exact": {"kernel": kernel}}}]}
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        (site,) = effattn.explain(causal, *made, policy=policy, options=options).sites
    return site.reason


def test_rows():
    row = replace(HERE, head_dims=(64, 128), queries=1000)
    with_rows = exact.GENERATED
    assert with_rows == () or all(isinstance(one, Faster) for one in with_rows)
    asked = ("causal", "sm90", "bfloat16", 128, 2000)
    assert not generated_is_faster(*asked)
    for changed, faster in (
        ({}, True),
        ({"architecture": "sm80"}, False),
        ({"kinds": ("all",)}, False),
        ({"dtypes": ("float16",)}, False),
        ({"head_dims": (64, 96)}, False),
        ({"queries": 2001}, False),
    ):
        exact.GENERATED = (replace(row, **{"architecture": "sm90", "dtypes": ("bfloat16",), **changed}),)
        try:
            assert generated_is_faster(*asked) is faster
            assert not generated_is_faster(*asked, training=True)
        finally:
            exact.GENERATED = with_rows


def test_sdpas_kernel_by_default(kernels_here):
    assert "SDPA" in route(tensors())
    assert route(tensors(), "sdpa") == route(tensors())


@pytest.mark.parametrize(
    ("made", "grad", "generated"),
    [
        ({}, False, True),
        ({"length": 299}, False, False),
        ({"dim": 8}, False, False),
        ({"dtype": torch.float16}, False, False),
        ({}, True, False),  # only the forward measured faster
    ],
)
def test_a_generated_one_where_it_measured_faster(kernels_here, monkeypatch, made, grad, generated):
    monkeypatch.setattr(exact, "GENERATED", (HERE,))
    given = [tensor.requires_grad_(grad) for tensor in tensors(**made)]
    assert ("generated kernel, which measured faster" in route(given, grad=grad)) is generated
    assert "SDPA" in route(given, "sdpa", grad=grad)
    monkeypatch.setattr(exact, "GENERATED", (replace(HERE, training=True),))
    assert ("measured faster" in route(given, grad=grad)) is (generated or grad)


def test_a_generated_one_where_it_is_asked_for(kernels_here):
    made = tensors(40)
    assert "as the policy asks" in route(made, "generated")
    policy = {"rule": [{"forms": ["exact"], "params": {"exact": {"kernel": "generated"}}}]}
    torch._dynamo.reset()
    fast = torch.compile(causal, backend="effattn", options={"policy": policy, "inner_backend": "eager"})
    with torch.no_grad():
        assert_close(fast(*made), causal(*made))


def test_reports_say_it_where_it_was_asked_for(kernels_here):
    for kernel, params in (("auto", {}), ("generated", {"kernel": "generated"})):
        policy = {"rule": [{"forms": ["exact"], "params": {"exact": {"kernel": kernel}}}]}
        torch._dynamo.reset()
        with torch.no_grad():
            report = effattn.explain(causal, *tensors(40), policy=policy)
        assert report.sites[0].params == params
        assert ('kernel = "generated"' in report.stanza) is bool(params)


def test_not_where_no_kernels_run():
    """A CPU's own target has none: SDPA is faster than pieces in ATen."""
    assert "SDPA" in route(tensors(), "generated")


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "generated"])
@pytest.mark.parametrize("faster", [False, True])
def test_the_op_decides_the_same(kernels_here, monkeypatch, kernel, faster):
    monkeypatch.setattr(exact, "GENERATED", (HERE,) * faster)
    started = []
    monkeypatch.setattr(triton, "prepare", lambda *args, prepare=triton.prepare: started.append(1) or prepare(*args))
    plan = Plan("exact", AttentionSpec(0.25 * s, k <= q), dispatch=Dispatch(kernel=kernel))
    made = tensors()
    out, _ = torch.ops.effattn.attend(*made, [], [], [], plan.encode())
    assert_close(out, causal(*made))
    assert bool(started) is (kernel == "generated" or (kernel == "auto" and faster))
    assert sdpa.dense(plan, *made) is not None


def test_the_function_takes_it_too(kernels_here, monkeypatch):
    made = tensors()
    for kernel in ("sdpa", "generated"):
        assert_close(effattn.attention(*made, form="exact", kernel=kernel), causal(*made))
    with pytest.raises(effattn.OptionError, match="kernel"):
        effattn.attention(*made, form="exact", kernel="triton")


def test_plans_name_no_other():
    text = Plan("exact", AttentionSpec(s)).encode()
    with pytest.raises(PlanError, match="bad kernel"):
        Plan.decode(text.replace('"kernel":"auto"', '"kernel":"mine"'))
