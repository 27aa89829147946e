"""The ops of linear attention against the references in float64: values, states, gradients, compilation, refusals."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from linear_cases import CASES, Case

from effattn.runtime.ops import linear
from effattn.runtime.ops.attend import NoGradient
from effattn.runtime.reference.linear import quadratic
from effattn.runtime.targets.portable import linear as linear_portable

ops = torch.ops.effattn
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-10}
WIDE = {
    "N 257, F 60": Case(1, 2, length=257, features=60, value_dim=64),
    "N 257, F 96, Dv 128": Case(1, 3, groups=3, length=257, features=96, value_dim=128, normalised=True, decay=False),
}


def close(actual, expected, tolerance, name=""):
    assert_close(actual, expected.double(), tolerance, exact_dtype=False, msg=lambda text: f"{name} {text}")


@pytest.fixture(params=[16, 128], ids="chunks of {}".format)
def chunk(request, monkeypatch):
    monkeypatch.setattr(linear_portable, "CHUNK", request.param)
    if request.param == 16:
        monkeypatch.setattr(linear_portable, "ELEMENTS", 1)  # a piece is one chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CASES, *WIDE])
def test_values(name, dtype, chunk):
    case = (CASES | WIDE)[name]
    tensors = case.tensors(dtype)
    out, state = ops.linear(*tensors, **case.meaning)
    expected, last = quadratic(*tensors, **case.meaning)
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    close(out, expected, TOLERANCES[dtype], "out")
    close(state, last, 1e-5, "state")


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, chunk):
    """Of query, key, value and the initial state, from output and final state together."""
    case = CASES[name]
    tensors = case.tensors(torch.float64, grad=True)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    torch.manual_seed(1)
    expected = quadratic(*tensors, **case.meaning)
    weights = [torch.randn_like(tensor) for tensor in expected]
    grads = torch.autograd.grad(expected, wanted, weights)
    found = torch.autograd.grad(ops.linear(*tensors, **case.meaning), wanted, weights)
    for got, want in zip(found, grads, strict=True):
        close(got, want, 1e-10)
    alone = torch.autograd.grad(ops.linear(*tensors, **case.meaning)[0], wanted, weights[0])
    for got, want in zip(
        alone, torch.autograd.grad(quadratic(*tensors, **case.meaning)[0], wanted, weights[0]), strict=True
    ):
        close(got, want, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_keep_the_dtype(dtype):
    case = CASES["a state, groups of 4"]
    tensors = case.tensors(dtype, grad=True)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    out, state = ops.linear(*tensors, **case.meaning, layout="bnhd")
    loss = out.float().sum() + state.sum()
    expected, last = quadratic(*tensors, **case.meaning)
    for got, want in zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected.sum() + last.sum(), wanted), strict=True
    ):
        assert got.dtype == want.dtype
        close(got, want, TOLERANCES[dtype])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.causal and case.length > 1])
def test_a_step_after_a_prefill_is_a_longer_prefill(name):
    case = CASES[name]
    query, key, value, decay, state = case.tensors()
    meaning = {name: value for name, value in case.meaning.items() if name != "causal"}
    out, last = ops.linear(query, key, value, decay, state, **meaning)
    for steps in (1, 3):
        first = (tensor[:, :, :-steps] for tensor in (query, key, value))
        rest = (tensor[:, :, -steps:] for tensor in (query, key, value))
        _, middle = ops.linear(*first, decay, state, **meaning)
        kept = middle.clone()
        tail, end = ops.linear_step(*rest, middle, decay, **meaning)
        close(tail, out[:, :, -steps:], 1e-5)
        close(end, last, 1e-5)
        assert torch.equal(middle, kept)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("name", ["normalised after a state", "a state, groups of 4", "other keys"])
def test_opcheck(name, needs_grad):
    case = CASES[name]
    tensors = case.tensors(grad=needs_grad)
    torch.library.opcheck(ops.linear.default, tensors, {**case.meaning, "layout": "bnhd"})
    if not needs_grad and case.causal:
        query, key, value, decay, state = tensors
        rest = {name: value for name, value in case.meaning.items() if name != "causal"}
        torch.library.opcheck(ops.linear_step.default, (query, key, value, state, decay), rest)


@pytest.mark.parametrize("name", ["normalised after a state", "groups without decay"])
def test_opcheck_of_the_backward(name):
    case = CASES[name]
    query, key, value, decay, state = case.tensors()
    out, last = ops.linear(query, key, value, decay, state, **case.meaning)
    args = (torch.randn_like(out), torch.randn_like(last), query, key, value, decay, state, out)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.linear_backward.default, args, {**case.meaning, "layout": "bnhd"}, test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_gradients(dynamic):
    case = CASES["a state, groups of 4"]

    def block(query, key, value, decay, state):
        out, last = torch.ops.effattn.linear(query.sin(), key, value, decay, state, 0.5, layout="bnhd")
        tail, end = torch.ops.effattn.linear_step(query[:, :, -1:].detach(), key[:, :, -1:].detach(),
                                                  value[:, :, -1:].detach(), last.detach(), decay)  # fmt: skip
        return out.transpose(1, 2).flatten(2) + 1, last.sum() + (tail.sum() + end.sum())

    torch._dynamo.reset()
    fast = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for length in (33, 50):
        query, key, value, decay, state = Case(**{**vars(case), "length": length}).tensors(grad=True)
        given = (query, key, value, decay, state)
        wanted = (query, key, value, state)
        expected, actual = block(*given), fast(*given)
        close(actual[0], expected[0], 1e-5)
        grads = [torch.autograd.grad(result[0].sum() + result[1], wanted) for result in (actual, expected)]
        for got, want in zip(*grads, strict=True):
            close(got, want, 1e-5)


def test_nothing_is_as_large_as_n_times_n():
    """The largest tensor grows with N."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    case = Case(1, 1, length=16_384, features=8, value_dim=8)
    tensors = case.tensors(grad=True)
    with Largest() as seen:
        out, state = linear.linear(*(tensor.detach() for tensor in tensors[:4]), **case.meaning)
        linear.linear_backward(torch.ones_like(out), None, *(tensor.detach() for tensor in tensors[:4]), None, out)
    assert seen.elements <= linear_portable.ELEMENTS < 16_384**2 / 8
    assert state.shape == (1, 1, 8, 8)


def test_no_tokens_leave_the_state_as_it_was():
    case = Case(length=0, keys=0, state=True)
    query, key, value, decay, state = case.tensors()
    out, last = ops.linear(query, key, value, decay, state)
    assert out.shape == (2, 4, 0, 16)
    assert torch.equal(last, state)
    assert last.data_ptr() != state.data_ptr()


def test_long_inputs_stay_exact_where_decay_is_strong():
    """A factor over the whole sequence would be exp(5 * 4096)."""
    case = Case(1, 2, length=4097, features=8, value_dim=8)
    query, key, value, _, _ = case.tensors()
    decay = torch.tensor([-5.0, -200.0])
    out, state = ops.linear(query, key, value, decay)
    expected, last = quadratic(query[:, :, -64:], key[:, :, -64:], value[:, :, -64:], decay)
    close(out[:, :, -32:], expected[:, :, -32:], 1e-5)
    close(state, last, 1e-5)


def test_refusals():
    query, key, value, decay, _ = CASES["decay"].tensors()
    calls = {
        "one key per query": (query[:, :, 1:], key, value),
        "has no age": (query, key, value, decay, None, 1.0, False),
        "must hold a float per query head": (query, key, value, decay[1:]),
        "a state must be": (query, key, value, decay, torch.zeros(2, 4, 16, 17)),
        "running sum": (query, key, value, decay, torch.zeros(2, 4, 16, 16), 1.0, True, True),
        "share a floating point dtype": (query.half(), key, value),
        "not a multiple": (query[:, :3], key[:, :2], value[:, :2]),
        "shapes do not fit": (query, key[..., 1:], value),
        "dimensions": (query[0], key[0], value[0]),
        "target one of": (query, key, value, None, None, 1.0, True, False, 0.0, "bhnd", "metal"),
    }
    for reason, args in calls.items():
        with pytest.raises(ValueError, match=reason):
            ops.linear(*args)
    with pytest.raises(NoGradient, match="no gradient for decay"):
        ops.linear(query, key, value, decay.clone().requires_grad_())
    stepped, _ = ops.linear_step(query.clone().requires_grad_(), key, value, torch.zeros(2, 4, 16, 16))
    with pytest.raises(NoGradient, match="linear_step has no gradient"):
        stepped.sum().backward()
