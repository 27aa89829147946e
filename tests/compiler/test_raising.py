"""What users of ``torch.compile`` catch: the errors of effattn themselves, not Dynamo's wrapping of them."""

from __future__ import annotations

import pathlib
import pickle
import traceback

import pytest
import torch
from comparing import assert_close

import effattn
from effattn.compiler import verify
from effattn.ir.refusal import Why

NO_LAYERS = {"rule": [{"layers": "0-5", "forms": ["window"]}]}
POWER = {"rule": [{"forms": ["power"]}]}


class Twice(torch.nn.Module):
    """Two layers, not causal: no form of a policy applies."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([_Attention(), _Attention()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class _Attention(torch.nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


MISTAKES = [
    ({"policy": "powr"}, effattn.PolicyError, "unknown policy 'powr'; did you mean 'power'?"),
    (
        {"policy": {"rule": [{"forms": ["powr"]}]}},
        effattn.PolicyError,
        "policy dict, key rule[0].forms[0]: unknown form",
    ),
    ({"policy": "nowhere.toml"}, effattn.PolicyError, "nowhere.toml: cannot read this policy file"),
    (
        {"policy": NO_LAYERS, "strict": True},
        effattn.PolicyError,
        "policy dict, key rule[0].layers: 0-5 ends after the last layer",
    ),
    ({"rset": "eager"}, effattn.OptionError, "unknown option 'rset'; allowed: policy, inner_backend"),
    ({"mode": "fast"}, effattn.OptionError, "option mode='fast'; allowed:"),
    ({"policy": POWER, "strict": True}, effattn.FormRefused, "layers.0"),
]


@pytest.mark.parametrize(("options", "kind", "start"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
@pytest.mark.parametrize("how", ["model", "forward", "function"])
def test_errors_come_as_themselves(options, kind, start, how):
    torch._dynamo.reset()
    model = Twice()
    given = {"model": model, "forward": model.forward, "function": lambda x: model(x)}[how]
    fast = torch.compile(given, backend="effattn", options={"rest": "eager"} | options)
    with pytest.raises(kind) as caught, torch.no_grad():
        fast(torch.randn(1, 2, 8, 16))
    error = caught.value
    assert str(error).removeprefix("model.").startswith(start)
    assert not isinstance(error, torch._dynamo.exc.BackendCompilerFailed)
    assert "".join(traceback.format_exception_only(error)) == f"effattn.errors.{type(error).__name__}: {error}\n"
    assert "TORCHDYNAMO_VERBOSE" not in repr(error)
    files = {pathlib.PurePath(frame.filename).name for frame in traceback.extract_tb(caught.tb)}
    assert files <= {"test_raising.py", "module.py", "eval_frame.py", "raising.py"}
    if kind is effattn.FormRefused:
        assert [refusal.rule for refusal in error.refusals] == [Why.CAUSAL]
    again = pickle.loads(pickle.dumps(error))
    assert type(again) in type(error).__mro__[1:]
    assert isinstance(again, kind)
    assert str(again) == str(error)


def test_after_a_mistake_the_model_still_compiles():
    torch._dynamo.reset()
    x, model = torch.randn(1, 2, 8, 16), Twice()
    with pytest.raises(effattn.PolicyError):
        torch.compile(model, backend="effattn", options={"policy": "powr"})(x)
    assert_close(torch.compile(model, backend="effattn", options={"rest": "eager"})(x), model(x))


def test_a_failed_verification_comes_as_itself(monkeypatch):
    torch._dynamo.reset()

    def different(*args):
        raise effattn.VerificationError("these differ")

    monkeypatch.setattr(verify, "_compare", different)
    model = Twice()
    fast = torch.compile(model, backend="effattn", options={"rest": "eager", "verify": True})
    with pytest.raises(effattn.VerificationError, match="these differ"), torch.no_grad():
        fast(torch.randn(1, 2, 8, 16))
