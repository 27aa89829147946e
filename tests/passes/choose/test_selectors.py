"""Forms that choose at run time, on the whole road: policy, rules, op in the graph, output; and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import VOCABULARY, build, inputs, llama, tokens
from comparing import assert_close
from compiled import compiled
from torch.utils.checkpoint import checkpoint

import effattn
from effattn.ir.refusal import Why
from effattn.lowering.forms import FORMS

PROXY = {"block": 16, "stride": 4, "least": 16, "gamma": 0.6}
DHSA = {"block": 16, "unit": 16, "share": 0.3, "local": 16, "sinks": 16}
TOKENS = {"block": 16, "unit": 1, "budget": 40, "chunk": 8, "local": 16, "sinks": 4}
CASES = {"proxy": ("proxy", PROXY), "dhsa": ("dhsa", DHSA), "tokens": ("dhsa", TOKENS)}


def policy(form: str, params: dict, **rule) -> dict:
    return {"rule": [{"forms": [form], "params": {form: params}, **rule}]}


def qkv(length: int = 90, heads: int = 4, kv_heads: int = 2, batch: int = 2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, h, length, 16, generator=generator) for h in (heads, kv_heads, kv_heads)]


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def expected(form: str, params: dict, q, k, v):
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    kept = FORMS[form].reference(FORMS[form].params(**params), q, k, allowed, q.shape[3] ** -0.5) & allowed
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True)


@pytest.mark.parametrize("name", CASES)
def test_what_the_policy_asks_for_is_computed(name):
    form, params = CASES[name]
    with torch.no_grad():
        report, out = compiled(attention, *qkv(), policy=policy(form, params))
    assert [site.form for site in report.sites] == [form]
    assert not report.sites[0].exact
    assert_close(out, expected(form, params, *qkv()))


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_lengths(name):
    """Compiled once with a symbolic length: exact below ``min_length``, the form from there on."""
    form, params = CASES[name]
    torch._dynamo.reset()
    options = {"rest": "eager", "strict": True, "policy": policy(form, params, min_length=64)}
    fast = torch.compile(attention, backend="effattn", options=options, fullgraph=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for length in (40, 64, 90, 300):
            args = qkv(length)
            for tensor in args:
                torch._dynamo.mark_dynamic(tensor, 2)
            wanted = expected(form, params, *args) if length >= 64 else attention(*args)
            assert_close(fast(*args), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.parametrize("name", CASES)
def test_with_inductor(name):
    form, params = CASES[name]
    torch._dynamo.reset()
    options = {"strict": True, "policy": policy(form, params)}
    fast = torch.compile(lambda q, k, v: attention(q * 2, k, v) + 1, backend="effattn", options=options, fullgraph=True)
    q, k, v = qkv()
    with torch.no_grad():
        out = fast(q, k, v)
    assert_close(out, expected(form, params, q * 2, k, v) + 1)


@pytest.mark.parametrize("name", CASES)
def test_as_a_function(name):
    form, params = CASES[name]
    out = effattn.attention(*qkv(), form=form, **params)
    assert_close(out, expected(form, params, *qkv()))
    torch._dynamo.reset()
    whole = torch.compile(effattn.attention, backend="eager", fullgraph=True)(*qkv(), form=form, **params)
    assert_close(whole, out)


def continued(forward, ids, steps=6):
    """The most likely tokens after ``ids``, over a cache and without an attention_mask."""
    made, out = [], forward(ids, use_cache=True)
    for _ in range(steps):
        made.append(out.logits[:, -1:].argmax(-1))
        out = forward(made[-1], past_key_values=out.past_key_values, use_cache=True)
    return torch.cat(made, dim=1)


def test_a_model_and_its_decode_steps():
    """Prefill by the form, decode exact, as its authors do; at full budget the answer is the model's own."""
    model, ids = llama(), tokens(batch=1, length=80)
    asked = {"proxy": {**PROXY, "gamma": 1.0}, "dhsa": {**DHSA, "share": 1.0}}
    with torch.no_grad():
        wanted = continued(model, ids)
        for form, params in asked.items():
            torch._dynamo.reset()
            options = {"rest": "eager", "strict": True, "policy": policy(form, params, stage="prefill")}
            got = continued(torch.compile(model, backend="effattn", options=options), ids)
            assert torch.equal(got, wanted)


def test_padding_on_the_left():
    """Padded rows get nothing from, and give nothing to, the choice of the others."""
    model, ids = llama(), tokens(batch=2, length=96)
    mask = torch.ones_like(ids)
    mask[0, :32] = 0
    options = {"rest": "eager", "strict": True, "policy": policy("proxy", {**PROXY, "gamma": 1.0})}
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
        torch._dynamo.reset()
        got = torch.compile(model, backend="effattn", options=options)(ids, attention_mask=mask, use_cache=False).logits
    assert_close(got[1], wanted[1])
    assert_close(got[0, 32:], wanted[0, 32:])


def refused(model, given, form, params):
    torch._dynamo.reset()
    with torch.no_grad():
        report = effattn.explain(model, policy=policy(form, params), **given)
    assert report.sites
    assert all(site.form == "exact" for site in report.sites)
    return {Why(rule) for site in report.sites for one in site.candidates for rule in one["rules"]}


def test_refusals_say_why():
    assert Why.ONLY_CAUSAL in refused(build("mistral", "sdpa"), inputs("mistral", False), "proxy", PROXY)
    assert Why.PLAIN_SCORE in refused(build("bloom", "eager"), inputs("bloom", False), "proxy", PROXY)
    assert Why.CAUSAL in refused(build("bert", "sdpa"), inputs("bert", False), "dhsa", DHSA)
    assert Why.DATA_MASK in refused(llama(), {**inputs("llama", True)}, "dhsa", DHSA)
    assert Why.GROUPS in refused(llama(), inputs("llama", False), "proxy", {**PROXY, "groups": 3})
    given = {"chunks": "given", **TOKENS}
    assert Why.BOUNDARIES in refused(llama(), inputs("llama", False), "dhsa", given)


def gradients(function, inputs, free: bool = False):
    """Output and gradients; ``free``: compiled for any length."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    for tensor in inputs if free else ():
        torch._dynamo.mark_dynamic(tensor, 2)
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[2])[:, None]).sum(), inputs)]


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("name", CASES)
def test_training(name, rest):
    """Gradients are those over the keys that were chosen, in one graph from ``min_length`` on, and another below."""
    form, params = CASES[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"inner_backend": rest, "strict": True, "policy": policy(form, params, min_length=64)}
    fast = torch.compile(attention, backend="effattn", options=options, fullgraph=True)
    for length in (90, 40, 300, 17) if rest == "eager" else (90, 40):
        if length < 64:
            wanted = gradients(attention, qkv(length))
        else:
            wanted = gradients(lambda *given: expected(form, params, *given), qkv(length))
        for got, want in zip(gradients(fast, qkv(length), free=True), wanted, strict=True):
            assert_close(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("name", CASES)
def test_training_of_a_function(name):
    """In eager mode, and in one graph for any number of queries."""
    form, params = CASES[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def function(*given):
        return effattn.attention(*given, form=form, **params)

    fast = torch.compile(function, backend="aot_eager", fullgraph=True)
    for length in (90, 41):
        wanted = gradients(lambda *given: expected(form, params, *given), qkv(length))
        for run, free in ((function, False), (fast, True)):
            for got, want in zip(gradients(run, qkv(length), free), wanted, strict=True):
                assert_close(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def in_a_checkpoint(q, k, v):
    return checkpoint(lambda *given: attention(*given).tanh(), q * 2, k, v, use_reentrant=False)


@pytest.mark.parametrize("name", CASES)
def test_training_with_checkpoints(name):
    form, params = CASES[name]
    torch._dynamo.reset()
    options = {"inner_backend": "eager", "strict": True, "policy": policy(form, params)}
    fast = torch.compile(in_a_checkpoint, backend="effattn", options=options, fullgraph=True)
    wanted = gradients(lambda q, k, v: expected(form, params, q * 2, k, v).tanh(), qkv())
    for got, want in zip(gradients(fast, qkv()), wanted, strict=True):
        assert_close(got, want)


def test_training_of_a_model():
    """At full budget its gradients are those of the model itself."""
    ids, found = tokens(batch=1, length=80), []
    for form, params in ((None, {}), ("proxy", {**PROXY, "gamma": 1.0}), ("dhsa", {**DHSA, "share": 1.0})):
        model = llama().train()
        torch._dynamo.reset()
        asked = {} if form is None else {"policy": policy(form, params, stage="train")}
        options = {"inner_backend": "eager", "strict": True, **asked}
        fast = model if form is None else torch.compile(model, backend="effattn", options=options)
        loss = fast(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *[parameter.grad for parameter in model.parameters()]])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert_close(got, want)
    report = effattn.explain(llama().train(), ids, policy=policy("dhsa", TOKENS), use_cache=False)
    assert {site.form for site in report.sites} == {"dhsa"}


@pytest.mark.parametrize(
    ("form", "params", "says"),
    [
        ("proxy", {"gamma": 0.0}, "gamma"),
        ("proxy", {"block": 100}, "power of two"),
        ("proxy", {"key_stride": 256}, "key_stride must be at most block"),
        ("dhsa", {"unit": 8}, "unit must be 1 or at least 16"),
        ("dhsa", {"unit": 1, "local": 16}, "local must be at least block"),
        ("dhsa", {"unit": 1, "budget": 100}, "budget must hold local and sinks"),
        ("dhsa", {"chunks": "words"}, "chunks"),
    ],
)
def test_wrong_parameters(form, params, says):
    with pytest.raises(effattn.PolicyError, match=says):
        effattn.Policy.of(policy(form, params))


@pytest.mark.parametrize("name", ["proxy", "dhsa", "power-hybrid", "linear-hybrid"])
def test_shipped_policies(name):
    model = llama(num_hidden_layers=9)
    with torch.no_grad():
        report = effattn.explain(model, torch.randint(3, VOCABULARY, (1, 64)), policy=name, use_cache=False)
    forms = [site.form for site in sorted(report.sites, key=lambda site: site.layer)]
    other = name.removesuffix("-hybrid")
    exact = {"power-hybrid": [0, 1, 7, 8], "linear-hybrid": [7]}.get(name, [])
    assert forms == ["exact" if layer in exact else other for layer in range(9)]
