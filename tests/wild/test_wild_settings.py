"""One model in every setting in which people run theirs: found, or left alone with the true reason, and right."""

from __future__ import annotations

import copy
import warnings

import einops
import pytest
import torch
import torch.nn.functional as F
from blocks import HEADS, PREDICATE, WIDTH, Attention, Int8Linear, Model
from comparing import assert_close
from images import Vit
from modules import HIDDEN, Nested
from row import check_gradients, compiled, seeded
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.two_tensor import TwoTensor

from effattn.compiler.backend import effattn
from effattn.compiler.options import Options
from effattn.compiler.report import collect


def model(**options) -> Model:
    return seeded(lambda: Model(**options)).eval()


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 13, WIDTH)), generator=torch.Generator().manual_seed(1))


def run(function, *args, tolerance: float | None = None, **options):
    """(report, output) of ``function`` compiled, after the output was held against the function's own."""
    expected = function(*args)
    fast, listening, settings = compiled(function, **options)
    with listening as heard:
        actual = fast(*args)
    assert_close(actual, expected, tolerance)
    return heard.report(settings), actual


def found(report) -> list[str]:
    assert report.missed == [], report.missed
    return [site.predicate for site in report.sites]


def reasons(report) -> list[str]:
    assert report.sites == [], report.sites
    return [missed.reason for missed in report.missed]


# -- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_without_gradients(mode):
    with mode():
        report, _ = run(model(), x(), verify=mode is torch.no_grad)
    assert found(report) == [PREDICATE] * 2
    assert [site.layer for site in report.sites] == [0, 1]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_autocast_around(grad):
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        report, _ = run(model(), x(), tolerance=3e-2)
    assert found(report) == [PREDICATE] * 2


def test_bfloat16():
    with torch.no_grad():
        report, out = run(model().bfloat16(), x().bfloat16(), tolerance=3e-2)
    assert found(report) == [PREDICATE] * 2
    assert out.dtype == torch.bfloat16


def test_float64_is_left_alone():
    with torch.no_grad():
        report, out = run(model().double(), x().double())
    assert reasons(report) == ["attention in torch.float64 is not supported"] * 2
    assert out.dtype == torch.float64


def test_training_without_dropout():
    report = check_gradients(model().train(), (x(),), symbolic=(0, 1))
    assert found(report) == [PREDICATE] * 2
    assert {site.stage for site in report.sites} == {"train"}


def test_training_with_dropout():
    fast, listening, settings = compiled(model(dropout=0.3).train(), verify=True)
    with listening as heard:
        fast(x()).sum().backward()
    report = heard.report(settings)
    assert found(report) == [PREDICATE] * 2
    assert all("dropout of the weights, p=0.3" in site.notes for site in report.sites)


def test_gradient_checkpointing():
    report = check_gradients(model(checkpointed=True).train(), (x(),), symbolic=(0, 1))
    assert found(report) == [PREDICATE] * 2
    assert {site.stage for site in report.sites} == {"train"}


@pytest.mark.parametrize(
    "options", [{"fullgraph": True}, {"dynamic": True}, {"fullgraph": True, "dynamic": True}], ids=str
)
def test_options_of_compile(options):
    with torch.no_grad():
        report, _ = run(model(), x(), **options)
    assert found(report) == [PREDICATE] * 2


@pytest.mark.parametrize("mode", ["reduce-overhead", pytest.param("max-autotune", marks=pytest.mark.slow)])
def test_modes_are_inductors(mode):
    module = model()
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(module, backend="effattn", mode=mode)(x()), module(x()))


def test_a_mode_that_does_not_exist():
    with pytest.raises(Exception, match="option mode='fastest'; allowed: 'default', 'reduce-overhead'"):
        torch.compile(model(), backend="effattn", mode="fastest")(x())


def test_lengths_and_batches_compile_no_more_often_than_without_us():
    def frames(backend) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        counter.backend = backend
        module, fast = model(), torch.compile(model(), backend=counter)
        with torch.no_grad():
            for batch, length in ((2, 11), (2, 19), (3, 19), (3, 33), (5, 40)):
                assert_close(fast(x(batch, length, WIDTH)), module(x(batch, length, WIDTH)))
        return counter.frame_count

    assert frames(lambda gm, given: effattn(gm, given, options={"rest": "eager", "strict": True})) <= frames("eager")


# -- pieces ---------------------------------------------------------------------------------------------------------


def by_layer(policy=None):
    """The report of a model whose blocks are compiled one by one, its output, and what it was before."""
    module = model()
    expected = module(x())
    options = {"rest": "eager", "strict": True, **({"policy": policy} if policy else {})}
    torch._dynamo.reset()
    with collect.listening() as heard:
        for block in module.blocks:
            block.compile(backend="effattn", options=options)
        actual = module(x())
    return heard.report(Options.read(options)), actual, expected


def policy_of(**rule):
    window = {"forms": ["window"], "params": {"window": {"window": 2, "sinks": 0}}}
    return {"schema": 1, "name": "narrow", "rule": [{**rule, **window}]}


def test_layer_by_layer():
    with torch.no_grad():
        report, actual, expected = by_layer()
    assert_close(actual, expected)
    assert set(found(report)) == {PREDICATE}
    assert {site.layer for site in report.sites} == {None}


def test_layer_by_layer_a_policy_matches_by_class():
    with torch.no_grad():
        report, actual, expected = by_layer(policy_of(model="Block"))
    assert {site.form for site in report.sites} == {"window"}
    assert (actual - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Model", "Block", "Attention"])
def test_a_policy_matches_every_enclosing_class(name):
    with torch.no_grad():
        fast, listening, settings = compiled(model(), policy=policy_of(model=name))
        with listening as heard:
            fast(x())
    assert {site.form for site in heard.report(settings).sites} == {"window"}


def test_layer_by_layer_a_policy_of_layers_is_told_to_be_unknown():
    with torch.no_grad():
        report, actual, expected = by_layer(policy_of(layers="0"))
    assert_close(actual, expected)
    assert {site.form for site in report.sites} == {"exact"}
    assert "which layer this is is not known; compile the whole model" in str(report)


def broken(when: str):
    """Attention with a graph break after its mask, or between softmax and value."""

    def function(x):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        i = torch.arange(x.shape[1])
        mask = i[None, :] > i[:, None]
        if when == "mask":
            torch._dynamo.graph_break()
        weights = (q @ q.mT).masked_fill(mask, float("-inf")).softmax(-1)
        if when == "weights":
            torch._dynamo.graph_break()
        return weights @ q

    return function


def test_a_graph_break_after_the_mask():
    report, _ = run(broken("mask"), x())
    assert found(report) == ["~mask[q, k]"]


def test_a_graph_break_after_the_weights():
    report, _ = run(broken("weights"), x())
    assert report.sites == []
    assert (
        "attention weights" in report.missed[0].reason or "stands between softmax and value" in report.missed[0].reason
    )


def test_a_compiled_block_in_a_compiled_model():
    module = model()
    inner = torch.compile(module.blocks[0], backend="effattn", options={"rest": "eager", "strict": True})
    with torch.no_grad():
        report, _ = run(lambda x: module.blocks[1](inner(x)), x())
    assert found(report) == [PREDICATE] * 2


# -- weights and tensors of other kinds ------------------------------------------------------------------------------


def test_linear_layers_in_eight_bits():
    module = model()
    for block in module.blocks:
        block.attention.qkv, block.attention.proj = Int8Linear(block.attention.qkv), Int8Linear(block.attention.proj)
    with torch.no_grad():
        report, _ = run(module, x())
    assert found(report) == [PREDICATE] * 2


def test_dynamic_quantisation():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(model(), {nn.Linear}, dtype=torch.qint8)
        report, _ = run(module, x())
    assert set(found(report)) == {PREDICATE}


class Tagged(torch.Tensor):
    """A subclass that changes nothing."""


def test_a_subclass_that_changes_nothing():
    with torch.no_grad():
        report, out = run(Vit().eval(), x().as_subclass(Tagged))
    assert found(report) == ["true"]
    assert isinstance(out, Tagged)


def test_a_subclass_that_holds_tensors_is_left_alone():
    with torch.no_grad():
        report, out = run(model(), TwoTensor(x(), x()))
    assert reasons(report) == ["its tensors are TwoTensors, a subclass that holds other tensors"] * 2
    assert isinstance(out, TwoTensor)


def test_nested_tensors_inside_are_as_with_dynamo_alone():
    """Dynamo takes another path through nn.TransformerEncoder than eager code does: the rows of padding differ."""
    module, given = seeded(Nested).eval(), (x(2, 9, 16), HIDDEN)
    with torch.no_grad():
        torch._dynamo.reset()
        expected = torch.compile(module, backend="eager")(*given)
        fast, listening, settings = compiled(module)
        with listening as heard:
            assert_close(fast(*given), expected)
    assert found(heard.report(settings)) == ["~padding[b, k]"] * 2


# -- programs and transformations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_is_left_alone(decomposed):
    module = model()
    with torch.no_grad():
        program = torch.export.export(module, (x(),))
        program = program.run_decompositions() if decomposed else program
        report, _ = run(program.module(), x())
    assert len(reasons(report)) == 2
    assert all("of an exported program, and these are not read" in reason for reason in reasons(report))


TRANSFORMED = {
    "vmap": lambda module: lambda x: torch.vmap(module)(x[:, None])[:, 0],
    "grad": lambda module: torch.func.grad(lambda x: module(x).square().sum()),
    "jvp": lambda module: lambda x: torch.func.jvp(module, (x,), (x.cos(),)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations_of_torch_func_inside_are_left_alone(name):
    report, _ = run(TRANSFORMED[name](Attention().eval()), x(), tolerance=1e-4)
    assert set(reasons(report)) == {"it runs inside a transformation of torch.func (vmap, grad, jvp)"}


@pytest.mark.parametrize("name", ["vmap", "grad"])
def test_transformations_of_torch_func_around(name):
    """Around a compiled function torch runs the user's code."""
    module = Attention().eval()
    fast, _, _ = compiled(module)
    with torch.set_grad_enabled(name == "grad"):
        assert_close(TRANSFORMED[name](fast)(x()), TRANSFORMED[name](module)(x()), 1e-4)


def test_functional_call():
    module = model()
    parameters = copy.deepcopy(dict(module.named_parameters()))
    with torch.no_grad():
        report, _ = run(lambda x: torch.func.functional_call(module, parameters, (x,)), x())
    assert found(report) == [PREDICATE] * 2


def test_flex_attention_with_both_mods():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def function(x):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        blocks = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < 5), None, None, x.shape[1], x.shape[1], "cpu")
        return flex_attention(
            q, q, q, score_mod=lambda s, b, h, i, j: torch.tanh(s / 4) * 4 - (i - j), block_mask=blocks
        )

    with torch.no_grad():
        report, _ = run(function, x())
    assert found(report) == [PREDICATE]
    assert "4*tanh(" in report.sites[0].score


def test_einops():
    def function(x):
        q = einops.rearrange(x, "b n (h d) -> b h n d", h=HEADS)
        weights = torch.einsum("b h i d, b h j d -> b h i j", q * 0.3, q).softmax(-1)
        return einops.rearrange(torch.einsum("b h i j, b h j d -> b h i d", weights, q), "b h n d -> b n (h d)")

    report, _ = run(function, x())
    assert found(report) == ["true"]


def test_sdpa_under_a_chosen_backend():
    def function(x):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(q.shape[2], q.shape[2]).tril().bool())

    with torch.no_grad():
        report, _ = run(function, x())
    assert found(report) == ["k <= q"]
