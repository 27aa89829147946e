"""``effattn.attention`` and the names of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from comparing import assert_close

import effattn
from effattn.ir.plan import Plan
from effattn.ir.refusal import Why
from effattn.lowering.forms import FORMS


def made(q_len=100, k_len=100, heads=6, kv_heads=2, dim=16, value_dim=16, batch=2):
    torch.manual_seed(0)
    return (
        torch.randn(batch, heads, q_len, dim),
        torch.randn(batch, kv_heads, k_len, dim),
        torch.randn(batch, kv_heads, k_len, value_dim),
    )


def eager(q, k, v, mask, scale):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@pytest.mark.parametrize(("q_len", "k_len"), [(100, 100), (1, 100), (40, 300), (300, 300)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("form", "params"),
    [
        ("exact", {}),
        ("window", {"window": 30, "sinks": 4}),
        ("window", {}),
        ("power", {"block": 16, "window": 32, "sinks": 8}),
        ("power", {}),
    ],
)
def test_every_form(form, params, scale, q_len, k_len):
    q, k, v = made(q_len, k_len)
    rows, columns = torch.arange(k_len - q_len, k_len)[:, None], torch.arange(k_len)[None, :]
    mask = (columns <= rows) & FORMS[form].reference(FORMS[form].params(**params), rows, columns)
    out = effattn.attention(q, k, v, form=form, scale=scale, **params)
    assert_close(out, eager(q, k, v, mask, scale))


def test_every_form_is_covered():
    assert set(effattn.forms()) == set(FORMS)
    assert effattn.forms()["power"].kind == "trained"


def test_not_causal():
    q, k, v = made(40, 60)
    out = effattn.attention(q, k, v, form="exact", causal=False)
    assert_close(out, eager(q, k, v, None, None))


def test_rows_before_the_first_key_are_zero():
    q, k, v = made(60, 40)
    out = effattn.attention(q, k, v, form="exact")
    assert (out[:, :, :20] == 0).all()
    assert_close(out[:, :, 20:], effattn.attention(q[:, :, 20:], k, v, form="exact"))


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.select is None])
def test_gradients(form):
    q, k, v = (tensor.double().requires_grad_() for tensor in made(19, 23, 4, 2, 3, 2))
    assert torch.autograd.gradcheck(lambda *args: effattn.attention(*args, form=form), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole_for_every_length(form):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def block(q, k, v):
        return effattn.attention(q + 1, k, v, form=form) * 2

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (64, 65, 130):
        inputs = made(length, length, value_dim=12)
        assert_close(compiled(*inputs), block(*inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"form": "powr"}, effattn.OptionError, r"unknown form 'powr'; did you mean 'power'\? Allowed: exact, window"),
        ({"windw": 3}, effattn.OptionError, r"form='power'.*unknown parameter 'windw'.*did you mean 'window'\?"),
        ({"window": 100}, effattn.OptionError, r"window must be a multiple of block \(128\), got 100"),
        ({"window": "x"}, effattn.OptionError, r"\): window: expected an integer, got 'x'"),
        ({"form": "window", "window": 0}, effattn.OptionError, r"window: .*greater than or equal to 1"),
        ({"form": "exact", "window": 8}, effattn.OptionError, r"unknown parameter 'window'"),
    ],
)
def test_what_a_wrong_call_gets(given, error, message):
    with pytest.raises(error, match=message):
        effattn.attention(*made(), **given)


def test_a_form_that_does_not_apply():
    with pytest.raises(effattn.FormRefused, match=r"form='power', causal=False") as caught:
        effattn.attention(*made(), causal=False)
    assert [refusal.rule for refusal in caught.value.refusals] == [Why.CAUSAL]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \[batch, heads, length, head_dim\], not \(6, 100, 16\)"),
        (lambda q, k, v: (q[:, :5], k, v), "5 query heads are not a multiple of 2"),
        (lambda q, k, v: (q, k, v[:, :, :7]), "agree in batch, heads and length"),
        (lambda q, k, v: (q, k[..., :7], v), "agree in batch and head_dim"),
        (lambda q, k, v: (q, k.double(), v), "k is torch.float64"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "floating point"),
        (lambda q, k, v: (q, k.to("meta"), v), "on meta"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        effattn.attention(*change(*made()))


def test_every_public_name_is_there():
    for name in effattn.__all__:
        assert getattr(effattn, name) is not None
    assert effattn.__version__
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        _ = effattn.atention


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, effattn; assert not {'torch', 'sympy', 'triton'} & set(sys.modules); print(len(dir(effattn)) > 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_a_plan_is_written_once(monkeypatch):
    q, k, v = made(20, 20)
    expected = effattn.attention(q, k, v, form="window", window=3)
    written = []
    encode = Plan.encode
    monkeypatch.setattr(Plan, "encode", lambda plan: written.append(plan) or encode(plan))
    assert torch.equal(effattn.attention(q, k, v, form="window", window=3), expected)
    assert written == []
    effattn.attention(q, k, v, form="window", window=4)
    assert len(written) == 1


@pytest.mark.parametrize("value", [1.0, True, "1", [1]])
def test_equal_to_a_valid_parameter_is_not_valid_itself(value):
    q, k, v = made(20, 20)
    effattn.attention(q, k, v, form="window", window=1)
    with pytest.raises(effattn.OptionError):
        effattn.attention(q, k, v, form="window", window=value)
