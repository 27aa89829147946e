"""Forms that choose at run time, as a GPU runs them: lists, outputs, CUDA graphs, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from sites import causal_site

import effattn
from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import Nk, Nq, k, q, s
from effattn.ir.plan import Plan, Sparsity
from effattn.runtime.selection import portable_steps, triton_steps
from effattn.runtime.selection.run import select
from effattn.runtime.targets import triton as triton_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CASES = {
    "proxy": ("proxy", {"least": 256, "gamma": 0.8}),
    "proxy_one_group": ("proxy", {"least": 256, "gamma": 0.8, "groups": 1}),
    "proxy_small_blocks": ("proxy", {"block": 32, "least": 64, "stride": 2, "gamma": 0.7}),
    "dhsa": ("dhsa", {"share": 0.2}),
    "tokens": ("dhsa", {"unit": 1, "budget": 500}),
    "dips": ("dhsa", {"unit": 1, "budget": 500, "chunks": "dip"}),
}


def qkv(length=1500, heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(2, h, length, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes]


def plan_of(name: str, dim: int = 64) -> Plan:
    form, params = CASES[name]
    chosen = effattn.forms()[form]
    return Plan(
        form,
        AttentionSpec(dim**-0.5 * s, k <= q + Nk - Nq),
        Sparsity(chosen.selector(chosen.params(**params), causal_site())),
    )


@pytest.mark.parametrize("name", CASES)
def test_lists_are_those_of_the_portable_target(name):
    query, key, _ = qkv(dtype=torch.float32)
    ours, wanted = (select(plan_of(name), query, key, steps=steps) for steps in (triton_steps, portable_steps))
    assert torch.equal(ours.kv_num_blocks, wanted.kv_num_blocks)
    one, other = (listed.rows(0, 1500, 8, 1500) for listed in (ours, wanted))
    assert (one != other).double().mean() < 1e-3  # scores that rounding makes equal may change places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_output_over_the_list(name, dtype):
    query, key, value = qkv(dtype=dtype)
    plan = plan_of(name)
    kept = select(plan, query, key, steps=triton_steps).rows(0, 1500, 8, 1500)
    kept &= torch.ones(1500, 1500, dtype=torch.bool, device="cuda").tril()
    out, lse = triton_target.run(plan, query, key, value)
    wide_key, wide_value = (x.double().repeat_interleave(4, 1) for x in (key, value))
    scores = (query.double() @ wide_key.mT / 8).masked_fill(~kept, -torch.inf)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-5
    assert_close(out, scores.softmax(-1) @ wide_value, tolerance, exact_dtype=False)
    assert_close(lse.double(), scores.logsumexp(-1), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_over_the_chosen_keys(name, dtype):
    """Of the keys that the op chose; nothing waits for the device, and runs give the same bits."""
    plan, given = plan_of(name), [x.requires_grad_() for x in qkv(dtype=dtype)]
    expand, places = plan.sparsity.select.expand, torch.arange(1500, device="cuda")
    units, _ = torch.ops.effattn.chosen_keys(*(x.detach() for x in given[:2]), [], [], [], plan.encode())
    kept = units[:, :, places // expand.block][..., places // expand.unit].repeat_interleave(8 // units.shape[1], 1)
    kept &= places <= places[:, None]
    wide = [x.detach().double().requires_grad_() for x in given]
    scores = (wide[0] @ wide[1].repeat_interleave(4, 1).mT / 8).masked_fill(~kept, -torch.inf)
    out = scores.softmax(-1) @ wide[2].repeat_interleave(4, 1)
    grad = torch.randn_like(out)
    wanted = [out, *torch.autograd.grad(out, wide, grad)]

    def run():
        found = torch.ops.effattn.attend(*given, [], [], [], plan.encode())[0]
        return [found.detach(), *torch.autograd.grad(found, given, grad.to(dtype))]

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 3e-2 if dtype == torch.bfloat16 else 5e-5
    for one, other, want in zip(first, second, wanted, strict=True):
        assert torch.equal(one, other)
        assert_close(one, want, tolerance, exact_dtype=False)


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_call_follows_its_inputs(name):
    plan, given = plan_of(name).encode(), qkv()
    for _ in range(3):
        torch.ops.effattn.attend(*given, [], [], [], plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = torch.ops.effattn.attend(*given, [], [], [], plan)
    for seed in (1, 2):
        fresh = qkv(seed=seed)
        for tensor, new in zip(given, fresh, strict=True):
            tensor.copy_(new)
        graph.replay()
        assert_close(out, torch.ops.effattn.attend(*fresh, [], [], [], plan)[0])


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_whole(name, mode):
    form, params = CASES[name]
    policy = {"rule": [{"forms": [form], "params": {form: params}}]}

    def call(q, k, v):
        return F.scaled_dot_product_attention(q * 2, k, v, is_causal=True, enable_gqa=True) + 1  # exact in every dtype

    torch._dynamo.reset()
    options = {"strict": True, "policy": policy, "mode": mode}
    fast = torch.compile(call, backend="effattn", fullgraph=True, options=options)
    with torch.no_grad():
        for seed in range(4):
            query, key, value = qkv(seed=seed)
            out = fast(query, key, value).clone()
            wanted = effattn.attention(query * 2, key, value, form=form, **params) + 1
            assert_close(out, wanted, 3e-2)


@pytest.mark.parametrize("name", ["proxy", "proxy_one_group", "dhsa", "tokens"])
def test_memory_at_128k(name):
    """At most 256 MiB beside inputs and output, at 32 heads."""
    shape = (1, 32, 131_072, 64)
    query = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn((1, 8, *shape[2:]), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    form, _ = CASES[name]
    chosen = effattn.forms()[form]
    plan = Plan(
        form,
        AttentionSpec(0.125 * s, k <= q),
        Sparsity(chosen.selector(chosen.params(**CASES[name][1]), causal_site())),
    )
    triton_target.run(plan, query, key, value)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = triton_target.run(plan, query, key, value)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before - out.nbytes - lse.nbytes
    assert used <= 256 << 20, f"{used >> 20} MiB"
