"""The rewritten graph: what it holds, what is gone, what must survive, and that compiled code can be cached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from torch import nn

from effattn.compiler import pass_manager
from effattn.compiler.backend import effattn
from effattn.errors import RewriteError
from effattn.ir.plan import Plan
from effattn.passes.choose.choice import ChooseForms
from effattn.passes.match.find import MatchAttention
from effattn.passes.rewrite import sites
from effattn.passes.rewrite.replacing import Emitted
from effattn.passes.rewrite.sites import RewriteSites
from effattn.runtime.targets import sdpa

GOLDENS = Path(__file__).parents[2] / "goldens" / "graphs"
B, H, N, D = 2, 4, 11, 8
INF = float("inf")


def qkv(*heads: int):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, N, D, generator=generator) for n in heads or (H, H, H)]


# -- goldens --------------------------------------------------------------------------------------------------------


def causal(q, k, v):
    n = q.shape[2]
    mask = torch.full((n, n), -INF).triu(1)
    return ((q @ k.mT) * 0.25 + mask).softmax(-1) @ v


def grouped_heads(q, k, v):
    k, v = (x[:, :, None].expand(B, H // 2, 2, N, D).reshape(B, H, N, D) for x in (k, v))
    out = F.softmax(q @ k.mT * 0.25, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    return out.transpose(1, 2).reshape(B, N, H * D)


def padded_window(q, k, v, padding):
    i = torch.arange(q.shape[2])
    seen = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen & padding[:, None, None, :])


def cache_step(q, k, v, keys, values, position):
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    mask = torch.arange(keys.shape[2])[None] <= position[:, None]
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None, None])
    position.add_(1)
    return out


def saved_counter(q, k, v, length):
    i = torch.arange(q.shape[2])
    mask = i[None] <= i[:, None] + length
    length.add_(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])


def not_attention(q, k, v):
    return (q.mean(-1) + k.mean(-1)).softmax(-1)[..., None] * v


def step_arguments():
    q, k, v = (x[:, :, :1] for x in qkv())
    return q, k, v, *qkv()[:2], torch.tensor([3])


GRAPHS = {
    causal: lambda: qkv(),
    grouped_heads: lambda: qkv(H, H // 2, H // 2),
    padded_window: lambda: (*qkv(), torch.arange(N) < torch.tensor([[N], [5]])),
    cache_step: step_arguments,
    saved_counter: lambda: (*qkv(), torch.tensor(2)),
    not_attention: lambda: qkv(),
}


def readable(code: str) -> str:
    """A graph's code without what differs between versions of torch."""
    lines = [line.split(";")[0].rstrip() for line in code.strip().splitlines()]
    return "\n".join(line for line in lines if line and not line.strip().startswith(("l_", "def "))) + "\n"


@pytest.mark.parametrize("function", GRAPHS, ids=lambda function: function.__name__)
def test_the_graph_is_as_accepted(function):
    """Accept a change on purpose with EFFATTN_ACCEPT=1."""
    report, _ = compiled(function, *GRAPHS[function]())
    path = GOLDENS / f"{function.__name__}.txt"
    found = readable(report.graph())
    if os.environ.get("EFFATTN_ACCEPT"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


def given_grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def given_grouped_in_half(q, k, v):
    return given_grouped(q.half(), k.half(), v.half())


@pytest.mark.parametrize(
    ("function", "expands"), [(grouped_heads, True), (given_grouped, True), (given_grouped_in_half, False)]
)
def test_grouped_heads_are_expanded_where_sdpa_would_hold_all_scores(function, expands, monkeypatch):
    """A GPU's kernels of SDPA take grouped heads in half precision alone."""
    monkeypatch.setitem(sdpa.KERNELS, "host", replace(sdpa.KERNELS["host"], grouped_only_in_half=True))
    report, _ = compiled(function, *qkv(H, H // 2, H // 2), tolerance=2e-5 if expands else 2e-3)
    code = report.graph()
    assert ("repeat_interleave(2, 1)" in code, "enable_gqa = True" in code) == (expands, not expands)
    assert ("grouped heads expanded in float32" in report.sites[0].reason) == expands


def test_a_graph_without_attention_stays_as_it_is():
    report, _ = compiled(not_attention, *qkv())
    assert report.sites == []
    assert report.graph() == report.graph(before=True)
    report, _ = compiled(lambda x: x * 2, torch.ones(3))
    assert report.sites == report.missed == []


# -- what survives --------------------------------------------------------------------------------------------------


def keep_everything(q, k, v, keys, values, position):
    """Writes to inputs of every kind, beside mask code that is dead after the rewriting."""
    keys[:, :, 1] = k[:, :, 0]
    values.copy_(v)
    position += 1
    mask = torch.zeros(N, N).masked_fill_(torch.ones(N, N).triu(1) > 0, -INF)
    out = (q @ keys.mT + mask).softmax(-1) @ values
    keys.mul_(2)
    torch.add(values, 1, out=values)
    return out


def test_writes_to_inputs_survive_and_mask_code_goes():
    keys, values = qkv()[:2]
    given = (*qkv(), keys, values, torch.tensor([3]))
    report, _ = compiled(keep_everything, *given)
    assert report.sites[0].predicate == "k <= q"
    after = report.graph()
    for name in ("setitem", "copy_", "mul_(2)", "out ="):
        assert name in after, name
    for name in ("triu", "masked_fill_", "torch.zeros", "matmul"):
        assert name not in after, name

    expected = [x.clone() for x in given]
    keep_everything(*expected)
    torch._dynamo.reset()
    torch.compile(keep_everything, backend="effattn", options={"rest": "eager", "strict": True})(*given)
    assert_close(list(given), expected)


def test_shared_mask_code_stays_for_its_other_user():
    def function(q, k, v):
        mask = torch.full((N, N), -INF).triu(1)
        return (q @ k.mT + mask).softmax(-1) @ v, mask

    report, _ = compiled(function, *qkv())
    assert "triu" in report.graph()
    assert report.sites[0].predicate == "k <= q"


def test_random_numbers_are_drawn_as_before():
    def function(q, k, v):
        noise = F.dropout(torch.ones(4), 0.5, training=True)
        out = (q @ k.mT).softmax(-1) @ v
        return out, noise, torch.rand(3)

    torch.manual_seed(0)
    expected = function(*qkv())
    torch._dynamo.reset()
    torch.manual_seed(0)
    actual = torch.compile(function, backend="effattn", options={"rest": "eager", "strict": True})(*qkv())
    assert_close(actual, expected)


# -- what inserted nodes carry --------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(H * D, 3 * H * D)

    def forward(self, x, padding):
        q, k, v = self.project(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(N, N, dtype=torch.bool).tril() & padding[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x, padding):
        for layer in self.layers:
            x = x + layer(x, padding)
        return x


def test_inserted_nodes_have_values_and_places():
    torch.manual_seed(0)
    model, x, padding = Model(), torch.randn(B, N, H * D), torch.ones(B, N, dtype=torch.bool)
    graphs = []

    def backend(gm, inputs):
        before = {node.name for node in gm.graph.nodes}
        run = effattn(gm, inputs, options={"rest": "eager", "strict": True})
        graphs.append((before, gm.graph))
        return run

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x, padding)
    ((before, graph),) = graphs
    inserted = [node for node in graph.nodes if node.name not in before]
    ops = [node for node in inserted if node.target is torch.ops.effattn.attend.default]
    assert len(ops) == 2
    for number, op in enumerate(ops):
        paths = [str(path) for path, _ in op.meta["nn_module_stack"].values()]
        assert f"layers[{number}]" in paths[-1] or f"layers.{number}" in paths[-1], paths
        assert "test_rewrite.py" in op.meta["stack_trace"]
    for node in inserted:
        assert "example_value" in node.meta, node


# -- caches ---------------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys, torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

def function(q, k, v, padding):
    i = torch.arange(q.shape[2])
    seen = (i[None] <= i[:, None]) & padding[:, None, None, :]
    return F.scaled_dot_product_attention(q * 2, k, v, attn_mask=seen, scale=0.3).relu()

torch.manual_seed(0)
q, k, v = (torch.randn(2, 3, 40, 8) for _ in range(3))
padding = torch.arange(40) < torch.tensor([[40], [20]])
plans = []
import effattn.ir.plan as plan
encode = plan.Plan.encode
plan.Plan.encode = lambda self: plans.append(encode(self)) or plans[-1]
out = torch.compile(function, backend="effattn", options={"strict": True})(q, k, v, padding)
torch.testing.assert_close(out, function(q, k, v, padding), rtol=1e-5, atol=1e-5)
print(json.dumps({"plans": plans, "autograd": dict(counters["aot_autograd"]), "inductor": dict(counters["inductor"])}))
"""


def test_a_second_process_hits_the_caches(tmp_path):
    found = []
    for seed in ("0", "12345"):
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "PYTHONHASHSEED": seed,
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROCESS],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        found.append(json.loads(ran.stdout.strip().splitlines()[-1]))
    first, second = found
    assert first["plans"] == second["plans"], "the same bytes in any process"
    assert len(first["plans"]) == 1
    assert Plan.decode(first["plans"][0]).encode() == first["plans"][0]
    assert first["autograd"].get("autograd_cache_bypass", 0) == 0
    assert second["autograd"].get("autograd_cache_hit", 0) == 1, second


# -- when a pass fails ----------------------------------------------------------------------------------------------


def broken(*args, **kwargs):
    raise ZeroDivisionError("on purpose")


def half_done(original):
    """A rewriting that fails after it has changed the graph."""

    def apply(self, work):
        original(self, work)
        raise RewriteError("on purpose")

    return apply


@pytest.mark.parametrize("step", [MatchAttention, ChooseForms, RewriteSites, "check", "half done"])
def test_an_exception_leaves_the_graph_as_it_was(step, monkeypatch):
    if step == "half done":
        monkeypatch.setattr(RewriteSites, "apply", half_done(RewriteSites.apply))
    elif step == "check":
        monkeypatch.setattr(pass_manager, "check", broken)
    else:
        monkeypatch.setattr(step, "apply", broken)
    given = step_arguments()
    expected_args = [x.clone() for x in given]
    expected = cache_step(*expected_args)
    graphs = []

    def backend(gm, inputs, **options):
        before = str(gm.graph)
        run = effattn(gm, inputs, options={"rest": "eager", **options})
        graphs.append((before, str(gm.graph)))
        return run

    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        actual = torch.compile(cache_step, backend=backend)(*given)
    told = [warning for warning in told if "effattn" in str(warning.message)]
    assert len(told) == 1
    assert "on purpose" in str(told[0].message)
    assert [before == after for before, after in graphs] == [True]
    assert_close(actual, expected)
    assert_close(list(given), expected_args)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="on purpose"):
        torch.compile(cache_step, backend=lambda gm, inputs: backend(gm, inputs, strict=True))(*step_arguments())


def test_the_check_between_passes_notices_lost_writes():
    from effattn.passes.rewrite.check import check

    graphs = []
    torch._dynamo.reset()
    torch.compile(cache_step, backend=lambda gm, inputs: graphs.append(gm) or gm.forward)(*step_arguments())
    graph = graphs[0].graph
    changed = torch.fx.Graph()
    changed.output(changed.graph_copy(graph, {}))
    for name in ("index_copy_", "add_"):
        copy = torch.fx.Graph()
        copy.output(copy.graph_copy(graph, {}))
        node = next(node for node in copy.nodes if str(node.target) == name)
        node.replace_all_uses_with(node.args[0])
        copy.erase_node(node)
        with pytest.raises(RewriteError, match=f"writes to inputs disappeared.*{name}"):
            check(copy, graph)
    check(changed, graph)


def test_a_replacement_of_another_shape_is_refused(monkeypatch):
    def smaller(writer, choice):
        return Emitted(writer.call(torch.narrow, choice.match.nodes.query.node, 2, 0, 3))

    monkeypatch.setitem(sites.EMITTERS, "sdpa", smaller)
    with pytest.raises(Exception, match=r"replacement of matmul_1 is .*\[2, 4, 3, 8\].*expected.*\[2, 4, 11, 8\]"):
        compiled(causal, *qkv())


def test_attention_over_the_result_of_another_one_reads_what_replaced_it():
    """Nothing lies between the two: the first must not be computed twice."""

    def twice(x):
        for _ in range(2):
            x = (x @ x.mT).softmax(-1) @ x
        return x

    report, _ = compiled(twice, torch.randn(1, 2, 8, 16))
    assert len(report.sites) == 2
    assert "softmax" not in report.graph()


# -- what SDPA's kernels on a GPU take ------------------------------------------------------------------------------


def plain(q, k, v):
    return (q @ k.mT * 0.3).softmax(-1) @ v


def of_packed(x, start=0):
    """With a gate beside query, key and value."""
    x = x[..., start : start + 3 * H * D]
    q, k, v = (x[..., part * H * D : (part + 1) * H * D].unflatten(-1, (H, D)).transpose(1, 2) for part in range(3))
    return plain(q, k, v)


def of_packed_after_the_gate(x):
    return of_packed(x, 1)


def _columns(n):
    """A key as it lies in a cache [B, H, D, N]."""
    return torch.randn(B, H, D, n).transpose(2, 3)


TAKEN = {  # what an attention is given, and how many operands have to be copied
    "[B, H, N, D]": (plain, qkv(), 0),
    "[B, N, H, D]": (plain, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv()], 0),
    "key [B, H, D, N]": (plain, [qkv()[0], _columns(N), qkv()[2]], 1),
    "key [B, H, D, 1]": (plain, [qkv()[0], _columns(1), qkv()[2][:, :, :1]], 1),
    "one row of many": (plain, [qkv()[0][:, :, 3:4], *qkv()[1:]], 0),
    "odd rows": (of_packed, [torch.randn(B, N, 3 * H * D + 1)], 3),
    "even rows": (of_packed, [torch.randn(B, N, 3 * H * D + 4)], 0),
    "an odd start": (of_packed_after_the_gate, [torch.randn(B, N, 3 * H * D + 4)], 3),
    "an odd width": (plain, [x[..., :5] for x in qkv()], 0),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", TAKEN)
def test_sdpa_is_given_what_its_kernels_take(name, dynamic, monkeypatch):
    """They raise where rows do not begin at multiples of 16 bytes, and the user's own product does not."""
    function, given, copies = TAKEN[name]
    monkeypatch.setitem(sdpa.KERNELS, "host", replace(sdpa.KERNELS["host"], aligned_only=True))
    lengths = () if not dynamic or 1 in given[-1].shape else (1,) if len(given) == 1 else (2,)
    report, _ = compiled(function, *given, lengths=lengths)
    assert "scaled_dot_product_attention" in report.graph()
    assert report.graph().count("clone(memory_format") == copies
