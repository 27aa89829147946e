"""Feature maps: their definitions, their sizes, their weights from files, attention through them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close

from effattn.errors import WeightsError
from effattn.lowering.forms.feature_maps import FEATURE_MAPS
from effattn.lowering.forms.feature_weights import load_layer
from effattn.runtime.ops.feature_attention import feature_attention

safetensors = pytest.importorskip("safetensors.torch")
HEADS, KV_HEADS, DIM = 4, 2, 16


def parameters(name: str, heads: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    shapes = FEATURE_MAPS[name].shapes(heads, DIM)
    return {key: torch.randn(shape).div(4).to(dtype) for key, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path):
    """A function that writes weights of a map for layer 3 and returns the path."""

    def save(name: str, **changed: torch.Tensor):
        tensors = {}
        for side, heads in (("query", HEADS), ("key", KV_HEADS)):
            tensors |= {f"layers.3.{side}.{key}": value for key, value in parameters(name, heads).items()}
        tensors |= {f"layers.3.{key.replace('__', '.')}": value for key, value in changed.items()}
        path = tmp_path / "maps.safetensors"
        safetensors.save_file(tensors, path)
        return path

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_are_as_many_as_said_and_not_negative(name, dtype):
    chosen = FEATURE_MAPS[name]
    x = torch.randn(2, HEADS, 7, DIM, dtype=dtype)
    features = chosen(x, parameters(name, HEADS, dtype))
    assert features.shape == (2, HEADS, 7, chosen.features(DIM))
    assert features.dtype == dtype
    assert (features >= 0).all()
    assert chosen.trained == bool(chosen.shapes(HEADS, DIM))


def test_the_two_hedgehogs_differ():
    x = torch.randn(1, 1, 5, DIM)
    weight = torch.eye(DIM)
    joint = FEATURE_MAPS["hedgehog_joint"](x, {"weight": weight, "bias": torch.zeros(DIM)})
    assert_close(joint, torch.softmax(torch.cat([2 * x, -2 * x], -1), -1))
    apart = FEATURE_MAPS["hedgehog"](x, {"weight": weight[None, :, : DIM // 2]})
    half = x[..., : DIM // 2]
    assert_close(apart, torch.cat([half.softmax(-1), (-half).softmax(-1)], -1))
    assert_close(apart.sum(-1), torch.full((1, 1, 5), 2.0))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_attention_is_the_definition(name, causal, saved):
    weights = load_layer(saved(name), name, 3, HEADS, KV_HEADS, DIM)
    query = torch.randn(2, HEADS, 33, DIM)
    key, value = torch.randn(2, KV_HEADS, 33, DIM), torch.randn(2, KV_HEADS, 33, 8)
    out = feature_attention(query, key, value, name, weights.query, weights.key, causal=causal)
    chosen = FEATURE_MAPS[name]
    features = chosen(key, weights.key).repeat_interleave(2, 1)
    scores = chosen(query, weights.query) @ features.mT
    scores = scores.tril() if causal else scores
    expected = scores @ value.repeat_interleave(2, 1) / (scores.sum(-1, keepdim=True) + 1e-6)
    assert_close(out, expected, 1e-4)


def test_a_row_without_weight_is_zero():
    query = -torch.ones(1, 1, 3, DIM)
    out = feature_attention(query, query, torch.randn(1, 1, 3, 4), "relu")
    assert torch.equal(out, torch.zeros(1, 1, 3, 4))


def test_gradients_reach_the_parameters():
    given = {key: value.requires_grad_() for key, value in parameters("hedgehog", 1).items()}
    x = torch.randn(1, 1, 9, DIM)
    feature_attention(x, x, torch.randn(1, 1, 9, 4), "hedgehog", given, given).square().sum().backward()
    assert given["weight"].grad.abs().sum() > 0


def test_elu_is_written_as_in_its_paper():
    x = torch.randn(4, 4)
    assert_close(FEATURE_MAPS["elu_plus_one"](x), torch.where(x > 0, x + 1, x.exp()))
    assert torch.equal(FEATURE_MAPS["relu"](x), F.relu(x))


def test_what_is_wrong_with_a_file_is_said(saved, tmp_path):
    wrong = {
        "no such file": (tmp_path / "absent.safetensors", {}),
        "not finite": ("t2r", {"key__bias": torch.full((KV_HEADS, DIM), torch.nan)}),
        r"'layers.3.query.weight' has shape \[1, 16, 16\]": ("t2r", {"query__weight": torch.zeros(1, DIM, DIM)}),
        "torch.int32; allowed": ("t2r", {"query__bias": torch.zeros(HEADS, DIM, dtype=torch.int32)}),
    }
    for reason, (name, changed) in wrong.items():
        path = saved(name, **changed) if isinstance(name, str) else name
        with pytest.raises(WeightsError, match=reason) as caught:
            load_layer(path, "t2r", 3, HEADS, KV_HEADS, DIM)
        assert str(path) in str(caught.value)
    with pytest.raises(WeightsError, match=r"no tensor 'layers.4.query.weight'.*nearest is 'layers.3"):
        load_layer(saved("t2r"), "t2r", 4, HEADS, KV_HEADS, DIM)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not one")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_layer(broken, "t2r", 3, HEADS, KV_HEADS, DIM)
