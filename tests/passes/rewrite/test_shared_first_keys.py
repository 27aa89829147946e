"""Forms that count from the first key of a text: one node of the graph finds it, for all layers that share a mask."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from compiled import compiled
from test_block_maps import N, documents, layers, qkv, two_masks, written_between

from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import b, first_key_of_query, k, load, q, s
from effattn.ir.plan import Dispatch, Plan
from effattn.runtime.ops.first_keys import plan_of
from effattn.runtime.targets import first_keys

WINDOW = {"window": 9, "sinks": 3}


def policy(**rule):
    return {"rule": [{"forms": ["window"], "params": {"window": WINDOW}, **rule}]}


@pytest.fixture
def found(monkeypatch):
    """How often first keys are looked for."""
    calls = []
    find = first_keys.first_keys_of_equals
    monkeypatch.setattr(first_keys, "first_keys_of_equals", lambda *given: calls.append(1) or find(*given))
    return calls


def by_definition(q, k, v, document):
    """The layers with the form's mask: a window, and the sinks of each document."""
    places = torch.arange(q.shape[2])
    same = document[:, :, None] == document[:, None]
    first = torch.where(same, places, q.shape[2]).amin(-1, keepdim=True)
    apart = places[:, None] - places
    mask = same & (apart >= 0) & ((apart < WINDOW["window"]) | (places < first + WINDOW["sinks"]))
    for _ in range(3):
        q = q + F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return q


@pytest.mark.parametrize("target", ["triton", "portable"])
def test_it_is_found_once_for_all_layers(target, found):
    report, out = compiled(layers, *qkv(), documents(), target=target, policy=policy(), verify=False)
    assert [site.form for site in report.sites] == ["window"] * 3
    assert report.graph().count("ops.effattn.first_keys") == 1
    assert len(found) == 1
    torch.testing.assert_close(out, by_definition(*qkv(), documents()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", [two_masks, written_between], ids=lambda function: function.__name__)
def test_each_mask_has_its_own(function):
    report, _ = compiled(function, *qkv(), documents(), target="portable", policy=policy(), verify=False)
    assert report.graph().count("ops.effattn.first_keys") == 2


def test_a_gradient_does_not_look_for_it_again(found):
    inputs = qkv(grad=True)
    options = {"inner_backend": "eager", "strict": True, "target": "portable", "policy": policy(stage="train")}
    torch._dynamo.reset()
    out = torch.compile(layers, backend="effattn", options=options)(*inputs, documents())
    grads = torch.autograd.grad(out.sum(), inputs)
    assert len(found) == 1
    wanted = torch.autograd.grad(by_definition(*inputs, documents()).sum(), inputs)
    torch.testing.assert_close(grads, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", ["triton", "portable"])
def test_short_calls_need_none(target, found):
    """Under a form's least number of keys every key is kept, and longer calls of the same graph look for it."""
    options = {"inner_backend": "eager", "strict": True, "target": target, "policy": policy(min_length=N + 1)}
    torch._dynamo.reset()
    run = torch.compile(layers, backend="effattn", options=options)
    for length, calls, definition in ((N, 0, layers), (N + 9, 1, by_definition)):
        *inputs, document = (*qkv(length), documents(length))
        for tensor, dim in (*((x, 2) for x in inputs), (document, 1)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        torch.testing.assert_close(run(*inputs, document), definition(*inputs, document), atol=1e-5, rtol=1e-5)
        assert len(found) == calls


@pytest.mark.parametrize("least", [0, N, N + 1])
def test_the_op(least):
    of_query, of_key = (load("document", [b, place], integer=True) for place in (q, k))
    spec = AttentionSpec(
        s, (k <= q) & sympy.Eq(of_query, of_key), k < first_key_of_query + 3, (CaptureSpec("document", "int64", 2),)
    )
    text, alone = plan_of(Plan("window", spec, dispatch=Dispatch(min_length=least)))
    assert alone.captures == (0,)
    query, key, _ = qkv(grad=True)
    torch.library.opcheck(torch.ops.effattn.first_keys.default, (query, key, [documents()], [], [], text))
    found = torch.ops.effattn.first_keys(query, key, [documents()], [], [], text)
    assert not found.requires_grad
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), documents() * 13 if least <= N else 0 * documents())
