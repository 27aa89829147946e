"""Attention that no graph holds is in the report: where it was called, how often, and why Dynamo has no graph of it."""

from __future__ import annotations

import functools
import html
import inspect
import pathlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import effattn
from effattn.versions import compiled_alone

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LAYERS = 5


def by_hand(x):
    return torch.softmax(x @ x.mT, -1) @ x


class Plain(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Prints(nn.Module):
    def forward(self, x):
        print("before")
        y = by_hand(x)
        print("after")
        return y


class Item(nn.Module):
    def forward(self, x):
        bias = x.sum().item()
        return F.scaled_dot_product_attention(x, x, x) + bias


class BreakInTry(nn.Module):
    """A break that Dynamo cannot resume from: the whole function runs eagerly."""

    def forward(self, x):
        for _ in range(2):
            try:
                if x.sum() < torch.inf:
                    x = torch.softmax(x @ x.mT, -1) @ x  # eager
            finally:
                x = x * 1
        return x


class Disabled(nn.Module):
    @torch.compiler.disable
    def attention(self, x):
        return F.scaled_dot_product_attention(x, x, x)  # eager

    def forward(self, x):
        return self.attention(x) + 1


def logged(function):
    """A decorator, whose code all functions share that it decorates."""

    @functools.wraps(function)
    def wrapped(*args):
        return function(*args)

    return wrapped


class DisabledInside(nn.Module):
    """What is disabled has a frame of code that was compiled elsewhere."""

    @functools.partial(torch.compiler.disable, reason="it logs")
    @logged
    def attention(self, x):
        return F.scaled_dot_product_attention(x, x, x)  # eager

    @logged
    def forward(self, x):
        return self.attention(x) + 1


class Generates(nn.Module):
    def parts(self, x):
        for _ in range(3):
            print(end="")
            yield F.scaled_dot_product_attention(x, x, x)  # eager

    def forward(self, x):
        return sum(self.parts(x))


class NeverTheSame(nn.Module):
    """Compiled anew for every number, until Dynamo has enough."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, x):
        return F.scaled_dot_product_attention(x * self.number, x, x)  # eager


class Layers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            print(end="")
        return x


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Plain(), Plain()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Router(nn.Module):
    """A softmax of no attention, in no graph: nothing to tell."""

    @torch.compiler.disable
    def route(self, x):
        best, _ = torch.softmax(x, -1).topk(2)
        return best.sum(-1, keepdim=True) @ x[..., :1, :]

    def forward(self, x):
        return self.route(x) * 2


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    @torch.compiler.disable
    def attend(self, x):
        return self.attention(x, x, x)[0]  # eager

    def forward(self, x):
        return self.attend(x[0])


class Flex(nn.Module):
    @torch.compiler.disable
    def attend(self, x):
        return flex_attention(x, x, x)  # eager

    def forward(self, x):
        return self.attend(x) + 1


def place_of(model: type) -> str:
    """file:line of the line marked ``# eager``."""
    lines, first = inspect.getsourcelines(model)
    return f"{__file__}:{first + next(number for number, line in enumerate(lines) if '# eager' in line)}"


def explained(model: nn.Module, **options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        return effattn.explain(model.eval(), torch.randn(1, 2, 8, 16), options=options or None)


@pytest.mark.parametrize("model", [Plain, Prints, Item])
def test_what_graphs_hold_is_not_outside(model):
    report = explained(model())
    assert len(report.sites) == 1
    assert report.outside == ()
    assert "outside compiled graphs" not in str(report)


def test_inductors_kernels_are_inside():
    assert explained(Prints(), rest="inductor").outside == ()


@pytest.mark.parametrize(
    ("model", "called", "calls", "reason"),
    [
        (BreakInTry, "softmax", 2, "Data-dependent branching"),
        (Disabled, "scaled_dot_product_attention", 1, "torch.compiler.disable keeps Disabled.attention out"),
        (
            DisabledInside,
            "scaled_dot_product_attention",
            1,
            "keeps DisabledInside.attention out of every graph: it logs",
        ),
        (Generates, "scaled_dot_product_attention", 3, "Dynamo gave up on forward"),
        (MultiHead, None, 1, "torch.compiler.disable keeps MultiHead.attend out"),
        (Flex, "flex_attention", 1, "torch.compiler.disable keeps Flex.attend out"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_eager_attention(model, called, calls, reason):
    report = explained(model())
    assert report.sites == []
    (one,) = report.outside
    assert one.called == called or called is None
    assert (one.calls, one.location) == (calls, place_of(model))
    assert reason in one.reason
    assert f"; {calls} ran outside compiled graphs" in str(report)
    assert one.reason in str(report)


def test_a_reason_outlives_its_run():
    """What Dynamo skipped once it skips without trying: the second report says what the first said."""
    model = BreakInTry()
    first = explained(model)
    with torch.no_grad():
        second = effattn.explain(model, torch.randn(1, 2, 8, 16))
    assert [one.reason for one in second.outside] == [one.reason for one in first.outside]


@pytest.mark.skipif(not compiled_alone(), reason="needs limits for each compilation")
def test_recompile_limit():
    limit = torch._dynamo.config.recompile_limit
    report = explained(Layers(NeverTheSame(number) for number in range(1, limit + LAYERS)))
    (one,) = report.outside
    assert len(report.sites) == limit
    assert (one.calls, one.location) == (LAYERS - 1, place_of(NeverTheSame))
    assert "recompile_limit" in one.reason
    again = explained(Layers(NeverTheSame(number) for number in range(1, limit + 1)))
    assert again.outside == ()


def test_a_loop_with_a_break_in_it():
    """All layers run one graph: one site, and how often it is called."""
    report = explained(Layers(Plain() for _ in range(LAYERS)))
    assert len(report.sites) == 1
    assert report.outside == ()
    assert [graph.calls for graph in report.graphs if graph.sites] == [LAYERS]
    assert f"calls      {LAYERS}" in str(report)


@pytest.mark.parametrize("how", ["module", "in place", "layers"])
@pytest.mark.parametrize("before", [False, True], ids=["not called", "called before"])
def test_a_model_that_is_compiled_already(how, before):
    """What is explained is the model itself, whatever it was compiled to."""
    torch._dynamo.reset()
    model = Two()
    for part in {"module": [], "in place": [model], "layers": model.layers}[how]:
        part.compile(backend="effattn", options={"rest": "eager"})
    if how == "module":
        model = torch.compile(model, backend="effattn", options={"rest": "eager"})
    x = torch.randn(1, 2, 8, 16)
    with torch.no_grad():
        if before:
            model(x)
        report = effattn.explain(model, x)
    assert len(report.sites) == 2
    assert report.outside == ()


def test_a_loop_with_an_eager_layer():
    report = explained(Layers([Plain(), Disabled(), Plain(), Disabled()]))
    assert "1 of 3 attention sites found" in str(report)
    assert "; 2 ran outside compiled graphs" in str(report)


def test_a_backward_pass_is_no_attention():
    """A checkpoint computes its attention once more."""

    def step(x):
        y = torch.utils.checkpoint.checkpoint(by_hand, x, use_reentrant=False)
        print(end="")
        y.sum().backward()
        return x.grad

    torch._dynamo.reset()
    report = effattn.explain(step, torch.randn(1, 2, 8, 16, requires_grad=True))
    assert len(report.sites) == 1
    assert report.outside == ()


def test_a_router_is_no_attention():
    report = explained(Router())
    assert report.outside == ()


def test_dynamo_switched_off():
    with torch._dynamo.config.patch(disable=True):
        report = explained(Plain())
    assert [one.calls for one in report.outside] == [1]
    assert "switched off" in str(report)


def test_as_data_and_as_a_page(tmp_path):
    report = explained(Disabled())
    body = report.to_dict()
    assert body["outside"][0]["location"] == place_of(Disabled)
    page = pathlib.Path(report.to_html(tmp_path / "report.html")).read_text(encoding="utf-8")
    assert "1 attention ran outside compiled graphs" in page
    assert html.escape(body["outside"][0]["reason"]) in page
