"""Several threads at once: first calls, compilations, reports and warnings."""

from __future__ import annotations

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from plans import CASES, Sizes, tensors

import effattn
from effattn import settings
from effattn.compiler.report import collect
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime import kernels
from effattn.runtime.targets import triton as triton_target
from effattn.runtime.targets.triton import linear as linear_triton

CPU = torch.device("cpu")
SIZES = Sizes(q_len=20, k_len=20)
CALL = CASES["causal_from_the_end"](SIZES, CPU)  # one plan: calls are known by its place in memory


def forget():
    for module in (triton_target, linear_triton):
        module.forget()


@pytest.fixture(autouse=True)
def nothing_remembered():
    forget()


def together(*works):
    """What each of ``works`` returns, all started at the same time."""
    ready = threading.Barrier(len(works))

    def run(work):
        ready.wait(timeout=600)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result() for done in [pool.submit(run, work) for work in works]]


def forward():
    return triton_target.run(
        CALL.plan, *tensors(SIZES), CALL.captures, CALL.scalars, CALL.numbers, config=Tiles(16, 16, 4, 1)
    )


def backward():
    query, key, value = tensors(SIZES)
    out = torch.ones(*query.shape[:3], value.shape[3])
    given = (query, key, value, out, torch.zeros(query.shape[:3]), CALL.captures, CALL.scalars, CALL.numbers)
    return triton_target.run_backward(CALL.plan, out, None, *given, config=Tiles(16, 16, 4, 1))


def linear():
    query, key, value = (torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    out = torch.empty_like(value)
    return out, linear_triton.run(query, key, value, None, None, out, scale=1.0, causal=True)


class Slow:
    """Makes the launchers of generated modules slow: the first to fill a record waits in the midst of it."""

    def __init__(self, module):
        self.inside, self.go_on, self.strides = threading.Event(), threading.Event(), module.strides
        self.calls = 0
        module.strides = self

    def __call__(self, tensor):
        self.calls += 1
        if self.calls == 3:
            self.inside.set()
            self.go_on.wait(timeout=600)
        return self.strides(tensor)


@pytest.mark.parametrize("work", [forward, backward, linear])
def test_two_first_calls_at_once(work, monkeypatch):
    expected = work()
    forget()
    slow: list[Slow] = []
    for module in (kernels, linear_triton):

        def load(spec, load=module.load):
            kernel = load(spec)
            if not slow:
                slow.append(Slow(kernel.module))
            return kernel

        monkeypatch.setattr(module, "load", load)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work)
        while not (slow and slow[0].inside.wait(timeout=600)):
            time.sleep(0.01)
        second = pool.submit(work)  # while the first fills its record
        time.sleep(0.5)
        slow[0].go_on.set()
        found = [first.result(), second.result()]
    for result in found:
        for tensor, want in zip(result, expected, strict=True):
            torch.testing.assert_close(tensor, want, rtol=0, atol=0)


def test_a_record_is_not_written_to():
    forward()
    (call,) = triton_target.CALLS._calls.values()
    with pytest.raises(TypeError):
        call.known["grid"] = None


def test_a_first_call_that_fails_leaves_nothing(monkeypatch):
    def broken(spec):
        raise RuntimeError("no kernel")

    with monkeypatch.context() as patched:
        patched.setattr(kernels, "load", broken)
        with pytest.raises(RuntimeError, match="no kernel"):
            forward()
    assert len(triton_target.CALLS) == 0
    forward()


def attention(q, k, v):
    scores = q @ k.transpose(-1, -2) * 0.25
    place = torch.arange(q.shape[2])
    keep = (place[None] <= place[:, None]) & (place[:, None] - place[None] < 5)
    return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v


def test_a_pool_that_calls_one_model_and_compiles_it_meanwhile():
    torch._dynamo.reset()
    options = {"rest": "eager", "target": "triton", "strict": True}
    compiled = torch.compile(attention, backend="effattn", options=options, dynamic=False)
    lengths = (17, 20, 24)
    inputs = {
        n: [torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for _ in range(3)] for n in lengths
    }
    expected = {n: attention(*inputs[n]) for n in lengths}
    compiled(*inputs[17])
    found = together(*[lambda n=n: (n, compiled(*inputs[n])) for n in lengths * 2])
    for n, out in found:
        assert_close(out, expected[n])


def test_gradients_in_several_threads():
    torch._dynamo.reset()
    options = {"rest": "eager", "target": "triton", "strict": True}
    compiled = torch.compile(attention, backend="effattn", options=options, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    given = [[torch.randn(1, 2, 20, 16, generator=generator, requires_grad=True) for _ in range(3)] for _ in range(3)]

    def gradients(function, tensors):
        return torch.autograd.grad(function(*tensors).square().sum(), tensors)

    expected = [gradients(attention, tensors) for tensors in given]
    found = together(*[lambda tensors=tensors: gradients(compiled, tensors) for tensors in given])
    for want, got in zip(expected, found, strict=True):
        for one, other in zip(want, got, strict=True):
            assert_close(other, one, 1e-4)


def test_who_listens_hears_only_its_own_thread():
    torch._dynamo.reset()
    both_listen = threading.Barrier(2)

    def compiling(function):
        with collect.listening() as heard:
            both_listen.wait(timeout=600)
            q = torch.randn(1, 2, 20, 16)
            torch.compile(function, backend="effattn", options={"rest": "eager"})(q, q, q)
            both_listen.wait(timeout=600)
        return [site.predicate for graph in heard.graphs for site in graph.sites]

    def causal(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(20, 20, dtype=torch.bool).tril(), scale=0.5)

    assert together(lambda: compiling(attention), lambda: compiling(causal)) == [
        compiling_alone(attention),
        compiling_alone(causal),
    ]


def compiling_alone(function):
    torch._dynamo.reset()
    q = torch.randn(1, 2, 20, 16)
    return [site.predicate for site in effattn.explain(function, q, q, q).sites]


def test_one_warning_from_many_threads(monkeypatch):
    class Slowly(set):
        def __contains__(self, key):
            found = super().__contains__(key)
            time.sleep(0.05)
            return found

    monkeypatch.setattr(settings, "_told", Slowly())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        together(*[lambda: settings.warn_once("once")] * 4)
    assert len(caught) == 1
