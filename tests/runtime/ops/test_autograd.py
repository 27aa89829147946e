"""The autograd kernel of ops: what it hands on, to whom, and how it differs in no other way from PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.logging_tensor import LoggingTensorMode, capture_logs
from torch.utils._python_dispatch import TorchDispatchMode

import effattn.runtime.ops  # noqa: F401  (registers torch.ops.effattn)
from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import k, q, s
from effattn.ir.plan import Plan
from effattn.runtime.ops.attend import NoGradient
from effattn.runtime.ops.autograd import autograd_kernel, reaches_kernels

SCHEMA = "(Tensor x, Tensor[] more, int[] sizes, Tensor? rest=None, float factor=2.0) -> (Tensor, Tensor)"
CAUSAL = Plan("exact", AttentionSpec(0.25 * s, k <= q)).encode()


class Toy:
    """An op with lists, an optional tensor and a default, in a namespace of its own."""

    def __init__(self) -> None:
        self.kernels, self.inputs, self.needed = 0, None, None
        self.library = torch.library.Library("effattn_toy", "FRAGMENT")
        self.library.define(f"op{SCHEMA}")
        self.library.impl("op", self.kernel, "CompositeExplicitAutograd")
        self.op = torch.ops.effattn_toy.op.default
        made = autograd_kernel(self.op, self.kernel, self.backward, self.setup_context)
        self.library.impl("op", made, "Autograd", with_keyset=True)

    def kernel(self, x, more, sizes, rest=None, factor=2.0):
        self.kernels += 1
        return (x * sum(more, start=torch.zeros(()))) * factor, x.detach().clone()

    def setup_context(self, ctx, inputs, output):
        self.inputs = inputs
        ctx.save_for_backward(inputs[0], *inputs[1])
        ctx.factor = inputs[4]

    def backward(self, ctx, grad, _grad_of_copy):
        x, *more = ctx.saved_tensors
        self.needed = ctx.needs_input_grad
        of_more = [(grad * x * ctx.factor).sum_to_size(one.shape) for one in more]
        return grad * sum(more) * ctx.factor, of_more, None, None, None


@pytest.fixture
def toy():
    made = Toy()
    yield made
    made.library._destroy()


def test_lists_have_gradients_and_defaults_are_filled(toy):
    x, a, b = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0), torch.tensor(7.0, requires_grad=True)
    out, _ = toy.op(x, [a, b], [1, 2])
    assert toy.inputs[2:] == ([1, 2], None, 2.0)
    first, second = torch.autograd.grad(out, (x, b), retain_graph=True)
    assert (first.item(), second.item()) == (24.0, 6.0)
    assert toy.needed == (True, [False, True], False, False, False)
    assert torch.autograd.grad(out, b)[0].item() == 6.0  # again, by the same node


def test_empty_lists(toy):
    x = torch.tensor(3.0, requires_grad=True)
    out, _ = toy.op(x, [], [])
    assert torch.autograd.grad(out, x)[0].item() == 0.0
    assert toy.needed == (True, [], False, False, False)


def test_no_node_where_nothing_needs_a_gradient(toy):
    x = torch.tensor(3.0, requires_grad=True)
    with torch.no_grad():
        assert not toy.op(x, [x], [])[0].requires_grad
    assert not toy.op(x.detach(), [x.detach()], [])[0].requires_grad
    assert toy.op(x.detach(), [x], [])[0].requires_grad
    assert toy.inputs is not None


def test_the_kernel_runs_below_autograd(toy):
    x = torch.tensor(3.0, requires_grad=True)
    with torch.enable_grad():
        _, copy = toy.op(x, [], [])
    assert isinstance(copy.grad_fn, torch.autograd.function.BackwardCFunction)  # the op's node, not that of clone


def test_modes_see_the_op():
    query = torch.randn(1, 2, 5, 8)
    with capture_logs() as logs, LoggingTensorMode():
        torch.ops.effattn.attend(query, query, query, [], [], [], CAUSAL)
    assert any("effattn.attend.default" in line for line in logs)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_tracing_sees_the_op(needs_grad):
    query = torch.randn(1, 2, 5, 8, requires_grad=needs_grad)
    traced = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x: torch.ops.effattn.attend(x, x, x, [], [], [], CAUSAL)[0], tracing_mode="fake"
    )(query)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert torch.ops.effattn.attend.default in targets


def test_what_is_negative_by_a_flag_is_made_plain_first():
    """The imaginary part of a conjugate holds its values with the opposite sign in memory."""
    number = torch.randn(1, 2, 5, 8, dtype=torch.complex64)
    lazy = number.conj().imag
    assert lazy.is_neg()
    plain = lazy.clone().resolve_neg()
    kernels = Plan.decode(CAUSAL).dispatched(target="triton").encode()
    found, _ = torch.ops.effattn.attend(lazy, lazy, lazy, [], [], [], kernels)
    wanted, _ = torch.ops.effattn.attend(plain, plain, plain, [], [], [], kernels)
    torch.testing.assert_close(found, wanted)


class Subclass(torch.Tensor):
    """One that only functions see."""


class Noting(TorchDispatchMode):
    """Notes which ops it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops.append(function)
        return function(*args, **(kwargs or {}))


def test_who_has_a_part_in_an_op_besides_its_kernel():
    """Where nobody has, an op is called as a function."""
    plain, seen = torch.randn(3), []
    assert not reaches_kernels(plain)  # a gradient may be recorded
    with torch.no_grad():
        assert reaches_kernels(plain)
        assert reaches_kernels(torch.nn.Parameter(plain))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert reaches_kernels(plain)
        with Noting():
            assert not reaches_kernels(plain)
        with torch.profiler.profile():
            assert not reaches_kernels(plain)
        with torch.device("cpu"):  # as every mode of functions
            assert not reaches_kernels(plain)
        assert not reaches_kernels(plain, plain.as_subclass(Subclass))
        with torch._subclasses.fake_tensor.FakeTensorMode():
            fake = torch.empty(3)
        assert not reaches_kernels(fake)
        torch.vmap(lambda x: seen.append(reaches_kernels(x)) or x)(torch.randn(2, 3))
        torch.func.jvp(lambda x: seen.append(reaches_kernels(x)) or x, (plain,), (plain,))
        assert seen == [False, False]
        assert not reaches_kernels(torch.randn(3, dtype=torch.complex64).conj().imag)
        assert not reaches_kernels(torch.empty(3, device="meta"))


def test_a_gradient_is_seen_by_modes_and_recorded_where_asked_for():
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    out = torch.ops.effattn.attend(query, query, query, [], [], [], CAUSAL)[0].sum()
    with Noting() as noting:
        torch.autograd.grad(out, query, retain_graph=True)
    assert torch.ops.effattn.attend_backward.default in noting.ops
    (first,) = torch.autograd.grad(out, query, create_graph=True)
    with pytest.raises(NoGradient, match="no second derivative"):
        torch.autograd.grad(first.sum(), query)
