"""Generated kernels as a GPU runs them: every plan against the definition in float64, gradients, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from plans import BY_HEAD, CASES, Call, Sizes, tensors

import effattn
from effattn.lowering.kernels.spec import Tiles
from effattn.runtime.ops import attend as _registers_the_op  # noqa: F401
from effattn.runtime.reference.attention import reference
from effattn.runtime.targets import triton as triton_target

DEVICE = torch.device("cuda")
# kept in half precision, results err by rounding of the inputs' products and of the output
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}
WITH_GRADIENT = ("none", "causal", "left_padding", "holes", "documents", "window_and_sinks", "alibi", "empty_rows_mean")


def sizes_of(kind: str, length: int = 333, dim: int = 64, value_dim: int = 64) -> Sizes:
    return Sizes(2, 8, 2, 1 if kind == "decode" else length, length, dim, value_dim)


def assert_right(call, kind: str, given, out, lse) -> None:
    """Output and LSE against float64; NaN and -inf in the same places."""
    wanted, wanted_lse = reference(call.plan, *given, call.captures, call.scalars, call.numbers)
    tolerance = TOLERANCE[out.dtype]
    assert_close(out, wanted, tolerance, exact_dtype=False)
    assert_close(lse, wanted_lse, 1e-3, exact_dtype=False)


def call_of(name: str, sizes: Sizes) -> Call:
    """A call of the table; "holes": keys that may be attended to are not consecutive."""
    call = CASES["left_padding" if name == "holes" else name](sizes, DEVICE)
    if name == "holes":
        call.captures[0][:, 40:50] = False
        call.captures[0][:, ::7] = False
    return call


def run_and_check(name: str, kind: str, dtype: torch.dtype, sizes: Sizes, config: Tiles | None = None) -> None:
    call = call_of(name, sizes)
    given = tensors(sizes, DEVICE, dtype, order="bnhd")
    out, lse = triton_target.run(call.plan, *given, call.captures, call.scalars, call.numbers, kind=kind, config=config)
    assert_right(call, kind, given, out, lse)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("name", [*CASES, "holes"])
def test_every_plan(name, kind):
    if kind == "decode" and name in BY_HEAD:
        pytest.skip("heads of a tile see different keys: never decoded")
    run_and_check(name, kind, torch.bfloat16, sizes_of(kind))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize(
    ("name", "kind"), [("causal", "prefill"), ("left_padding", "prefill"), ("cache_by_pointer", "decode")]
)
def test_dtypes(name, kind, dtype):
    run_and_check(name, kind, dtype, sizes_of(kind))


@pytest.mark.parametrize(("name", "kind"), [("left_padding", "prefill"), ("cache_by_pointer", "decode")])
@pytest.mark.parametrize(("dim", "value_dim"), [(60, 60), (96, 80), (128, 128), (256, 256)])
def test_head_dimensions(dim, value_dim, name, kind):
    run_and_check(name, kind, torch.bfloat16, sizes_of(kind, 700, dim, value_dim))


@pytest.mark.parametrize(
    ("name", "dtype", "dim", "value_dim"),
    [
        *((name, torch.bfloat16, 64, 64) for name in WITH_GRADIENT),
        ("causal", torch.float32, 64, 64),
        ("causal", torch.bfloat16, 96, 80),
    ],
)
def test_gradients(name, dtype, dim, value_dim):
    """Through the op, as a training step takes them."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    sizes = sizes_of("prefill", 257, dim, value_dim)
    call = call_of(name, sizes)
    data = (call.captures, call.scalars, call.numbers)
    given = [tensor.requires_grad_() for tensor in tensors(sizes, DEVICE, dtype)]
    leaves = [tensor.detach().double().requires_grad_() for tensor in given]
    wanted, _ = reference(call.plan, *leaves, *data)
    out, _ = torch.ops.effattn.attend(*given, *data, call.plan.encode())
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, out.dtype)
    out.backward(grad)
    wanted.backward(grad.double())
    for tensor, leaf in zip(given, leaves, strict=True):
        size = leaf.grad.abs().max().item()
        assert (tensor.grad.double() - leaf.grad).abs().max().item() < tolerance * size


def test_a_recorded_decode_step_follows_the_cache():
    """The length lives on the device: a CUDA graph that was recorded at one length is right at others."""
    sizes = Sizes(2, 8, 2, 1, 3000, 64, 64)
    call = CASES["cache_by_pointer"](sizes, DEVICE)
    given = tensors(sizes, DEVICE, torch.bfloat16)

    def step():
        return torch.ops.effattn.attend(*given, call.captures, call.scalars, call.numbers, call.plan.encode())

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for live in (5, 700, 2999):
        call.captures[0].fill_(live)
        graph.replay()
        assert_right(call, "decode", given, out, lse)


@pytest.mark.parametrize(("form", "params"), [("power", {"block": 128}), ("window", {}), ("exact", {})])
def test_forms_as_functions(form, params):
    """Compiled and replayed as a CUDA graph: the same as on the portable target."""
    more = {} if form == "exact" else {"window": 256, "sinks": 128}

    def attend(q, k, v):
        return effattn.attention(q, k, v, form=form, **params, **more)

    fast = torch.compile(attend, mode="reduce-overhead", fullgraph=True, dynamic=False)
    sizes = Sizes(1, 8, 2, 1500, 1500, 64, 64)
    for seed in range(4):
        given = tensors(sizes, DEVICE, torch.float32, seed=10 * seed)
        wanted = attend(*[tensor.cpu() for tensor in given])
        assert_close(fast(*given).cpu(), wanted)
