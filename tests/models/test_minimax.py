"""MiniMax: its lightning attention, a loop over blocks with decay tables in buffers, becomes one site a layer."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from effattn.compiler.backend import effattn
from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.errors import DecayChanged
from effattn.ir.refusal import Why
from effattn.versions import cache_argument

LINEAR, FULL = "linear_attention", "full_attention"
CACHE = cache_argument(MiniMaxForCausalLM.forward)
# before, Dynamo leaves the end of the last block symbolic where the length is
LOOPS_ARE_UNROLLED = not torch.__version__.startswith("2.11")


def minimax(layers=(LINEAR, FULL), **changes):
    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=list(layers),
        initializer_range=0.2,
        attn_implementation="eager",
        **changes,
    )
    return MiniMaxForCausalLM(config).eval()


def tokens(length, batch=2):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(length))


class Compiled:
    """A compiled model with the report of what was compiled in its calls."""

    def __init__(self, model, **options):
        torch._dynamo.reset()
        self.options = {"strict": True, "rest": "eager", **options}
        self.fast = torch.compile(model, backend=lambda gm, args: effattn(gm, args, options=self.options))

    def __call__(self, **given):
        with collect.listening() as heard:
            out = self.fast(**given)
        self.report = heard.report(Options.read(self.options))
        self.linear = [site for site in self.report.sites if site.found_as == "linear"]
        self.missed = [missed for missed in self.report.missed if missed.attention]
        return out


def near(actual, expected, tolerance=1e-5):
    assert_close(actual, expected, tolerance)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("length", [17, 256, 300, 600])
def test_prefill_and_steps(length, padded):
    model, given = minimax(), {"input_ids": tokens(length), "use_cache": True}
    if padded:
        given["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        given["attention_mask"][0, :5] = 0
    fast = Compiled(model, verify=True)
    actual, expected = fast(**given), model(**given)
    assert fast.missed == []
    (site,) = fast.linear
    assert (site.form, site.exact, site.stage, site.layer) == ("linear", True, "prefill", 0)
    assert (site.predicate, site.score) == ("k <= q", "s*exp(-(q - k)*slopes[h, 0, 0]), no softmax")
    assert fast.report.graph().count("effattn.linear.default") == 1
    near(actual.logits, expected.logits)
    for number in range(2):  # steps; the second token goes through the graph compiled for the first
        near(actual.past_key_values.linear_cache[0], expected.past_key_values.linear_cache[0])
        given = {"input_ids": tokens(1), "use_cache": True}
        actual = fast(**given, **{CACHE: actual.past_key_values})
        expected = model(**given, **{CACHE: expected.past_key_values})
        near(actual.logits, expected.logits)
        if number == 0:
            (step,) = fast.linear
            assert (step.stage, step.exact, fast.missed) == ("decode", True, [])
            assert "effattn.linear_step" in fast.report.graph()


@torch.no_grad()
def test_one_site_a_layer_under_inductor():
    model = minimax([LINEAR, LINEAR, FULL, LINEAR])
    fast, given = Compiled(model, rest="inductor"), {"input_ids": tokens(300, 1), "use_cache": False}
    near(fast(**given).logits, model(**given).logits)
    assert [site.layer for site in fast.linear] == [0, 1, 3]
    assert fast.missed == []
    assert "triangle" not in fast.report.graph()


@torch.no_grad()
def test_lengths_that_are_symbolic():
    model = minimax()
    fast = Compiled(model)
    for length in (300, 400, 257, 511, 90, 17, 256, 513):
        given = {"input_ids": tokens(length), "use_cache": False}
        near(fast(**given).logits, model(**given).logits)
        assert [missed.rule for missed in fast.missed] == (
            [] if LOOPS_ARE_UNROLLED else [Why.BLOCKS] * len(fast.missed)
        )


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_gradients(rest):
    model = minimax()
    given = {"input_ids": tokens(300), "labels": tokens(300), "use_cache": False}
    fast = Compiled(model, rest=rest)
    losses = fast(**given).loss, model(**given).loss
    assert fast.linear[0].stage == "train"
    for actual, expected in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses), strict=True):
        near(actual, expected)


TABLES = {
    "slope_rate": (1, 0, 0),
    "query_decay": (0, 3, 0),
    "key_decay": (0, 250, 0),
    "diagonal_decay": (0, 1, 9, 5),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_no_decay(name):
    """Refused with the reason; written after compiling, an error and never another result."""
    model, given = minimax(), {"input_ids": tokens(300), "use_cache": False}
    table = getattr(model.model.layers[0].self_attn, name)
    running = Compiled(model)
    running(**given)
    assert len(running.linear) == 1
    table.data[TABLES[name]] *= 1.001  # through .data: no version counter tells
    with pytest.raises(DecayChanged, match="no longer powers of one rate"):
        running(**given)
    anew = Compiled(model)
    near(anew(**given).logits, model(**given).logits)
    assert anew.linear == []
    (missed,) = anew.missed
    assert missed.name.startswith("model.layers.0.self_attn")
    assert missed.rule == Why.DECAY


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*no longer holds what it held")
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_written_later_is_data(name):
    model, given = minimax((LINEAR,)), {"input_ids": tokens(300), "use_cache": False}
    table = getattr(model.model.layers[0].self_attn, name)
    kept = table.clone()
    running = Compiled(model)
    near(running(**given).logits, model(**given).logits)
    assert len(running.linear) == 1
    for value in (kept, kept * 1.001, kept):
        table.copy_(value)
        near(running(**given).logits, model(**given).logits)


@torch.no_grad()
def test_keys_that_decay_beyond_the_diagonal_are_no_decay():
    model, given = minimax(), {"input_ids": tokens(60), "use_cache": False}
    model.model.layers[0].self_attn.diagonal_decay[0, 2, 4, 5] = 1e-6
    fast = Compiled(model)
    near(fast(**given).logits, model(**given).logits)
    assert fast.linear == []


@torch.no_grad()
def test_other_decays_are_followed():
    """All four buffers for another rate, loaded after compiling: the rate is read in every call."""
    model, given = minimax(), {"input_ids": tokens(300), "use_cache": False}
    fast, layer = Compiled(model), model.model.layers[0].self_attn
    fast(**given)
    slopes = layer.slope_rate * 0.37
    tables = layer.decay_factors(slopes)
    for name, value in zip(TABLES, (slopes, *tables), strict=True):
        getattr(layer, name).copy_(value)
    near(fast(**given).logits, model(**given).logits)


@torch.no_grad()
def test_rounded_buffers():
    """In bfloat16 the tables are rounded powers: the state is nearer to the user's formula than his own."""
    model = minimax([LINEAR])
    layer = model.model.layers[0].self_attn
    layer.to(torch.bfloat16)
    x = torch.randn(2, 600, 32).bfloat16()
    fast = Compiled(layer)
    given = {"position_embeddings": None, "attention_mask": None}
    wide = layer.act_fn(layer.qkv_proj(x)).double()  # what both read, before anything else is rounded
    actual, expected = fast(hidden_states=x, **given)[1], layer(x, **given)[1]
    assert len(fast.linear) == 1
    layer.double()
    layer.qkv_proj = layer.act_fn = torch.nn.Identity()
    layer.output_gate = torch.nn.Linear(wide.shape[2], 32).double()
    exact = layer(wide, **given)[1]
    errors = [(state.double() - exact).norm() for state in (actual, expected)]
    assert errors[0] < errors[1]


def test_without_values_it_is_left_alone():
    """A backend that is only given fake inputs cannot look at the tables."""
    model, found = minimax([LINEAR]), []

    def backend(gm, args):
        fake = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
        with collect.listening() as heard:
            effattn(gm, fake, options={"strict": True, "rest": "eager"})
        found.append(heard.report(Options.read({})))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(tokens(60), use_cache=False)
    assert found[0].sites == []
    assert any(missed.rule == Why.DECAY for missed in found[0].missed)
