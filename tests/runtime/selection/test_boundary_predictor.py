"""DHSA v1 with a trained predictor: what it computes, where it cuts, what a file must hold, what is refused."""

from __future__ import annotations

import pytest
import torch
from boundary_cases import CHANNELS, DIM, HEADS, KV_HEADS, Published, random_tensors, save
from comparing import assert_close
from sites import causal_site

import effattn
from effattn.errors import OptionError, WeightsError
from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import Nk, Nq, k, q, s
from effattn.ir.plan import Plan, Sparsity
from effattn.ir.selector import Trained
from effattn.lowering.forms import FORMS, boundary_weights
from effattn.lowering.forms.tensor_file import digest_of
from effattn.runtime.selection import predictor as running
from effattn.runtime.selection.run import select
from effattn.runtime.targets import portable

safetensors = pytest.importorskip("safetensors.torch")


def greedy(scores, apart, most):
    """The greatest first, then what is farther than ``apart`` from all taken ones; of equals the earlier."""
    taken = []
    for one in scores.argsort(descending=True, stable=True).tolist():
        if scores[one] > -torch.inf and len(taken) < most and all(abs(one - other) > apart for other in taken):
            taken.append(one)
    return sorted(taken)


def bounds_of(logits, window, threshold, apart, most):
    """Where chunks begin, and the length: as the published code finds them."""
    length = len(logits)
    place = torch.arange(length)
    open_ = (place >= window - 1) & (place < length - window) & (logits > threshold)
    return [0, *(one + 1 for one in greedy(logits.masked_fill(~open_, -torch.inf), apart, most)), length]


def made(length, batch=2, seed=1, heads=HEADS, kv_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, length, DIM, generator=generator) for h in (heads, kv_heads, kv_heads)]


def piece(path, layer=None, **changed):
    return Trained(weights=path, digest=digest_of(path), layer=layer, **{"threshold": 0.2, "block": 16, **changed})


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("window", [4, 2])
@pytest.mark.parametrize("length", [1, 5, 8, 9, 61])
def test_logits_and_cuts_are_the_published_ones(tmp_path, length, window, pool, monkeypatch):
    monkeypatch.setattr(running, "ELEMENTS", 2 * 2 * window * 3 * CHANNELS * 10)  # pieces of ten gaps
    tensors = random_tensors(pool)
    path = save(tmp_path / "cut.safetensors", {"all.": tensors}, window=str(window))
    _, key, _ = made(length)
    eager = Published(tensors, 4, window)
    asked = piece(path, apart=3)
    found = running.logits(boundary_weights.on_device(path, asked.digest, None, KV_HEADS, DIM, key.device), key)
    begins = running.cuts(asked, key)
    for b in range(2):
        wanted = eager(key[b])
        assert_close(found[b], wanted, exact_dtype=False)
        bounds = bounds_of(wanted, window, 0.2, 3, max(length // 16, 1) * 8)
        assert begins[b].nonzero()[:, 0].tolist() == bounds[1:-1]


@pytest.mark.parametrize("apart", [1, 8, 20])
@pytest.mark.parametrize("most", [3, 1000])
def test_suppression_is_the_greedy_one(apart, most):
    torch.manual_seed(0)
    scores = torch.randn(3, 700)
    scores[0, 100 : 100 + 20 * apart] = 5.0  # equal ones: the first, then every apart + 1
    scores[1] = scores[1].masked_fill(scores[1] < 0.5, -torch.inf).round(decimals=1)
    scores[2] = -torch.inf
    found = running.suppress(scores, apart, most)
    for row, kept in zip(scores, found, strict=True):
        assert kept.nonzero()[:, 0].tolist() == greedy(row, apart, most)


def test_a_long_falling_run_is_cut_at_its_head_and_never_too_densely():
    falling = torch.arange(10_000, 0, -1).float()[None]
    found = running.suppress(falling, 8, 10_000)[0].nonzero()[:, 0]
    assert found.tolist() == list(range(0, 9 * running.ROUNDS, 9))


def cosine_rule(channels=CHANNELS):
    """A predictor that says ``100 (0.5 - cosine of both sides)``: the attention finds each token itself."""
    eye = torch.eye(channels)
    first = torch.zeros(1, 4 * channels + 1)
    first[0, -1] = -1.0
    return {
        "enc.mha.in_proj_weight": torch.cat([eye * 4, eye * 4, eye]),
        "enc.mha.in_proj_bias": torch.zeros(3 * channels),
        "enc.mha.out_proj.weight": eye,
        "enc.mha.out_proj.bias": torch.zeros(channels),
        "enc.norm.weight": torch.ones(channels),
        "enc.norm.bias": torch.zeros(channels),
        "mlp.0.weight": first,
        "mlp.0.bias": torch.tensor([0.5]),
        "mlp.2.weight": torch.tensor([[100.0]]),
        "mlp.2.bias": torch.zeros(1),
    }


def topics(length, borders, seed=2):
    """Keys [1, Hkv, N, D] of one direction between two borders, another after each."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator))[0] * 4
    ends = [*borders[1:], length]
    rows = torch.cat([directions[i].expand(e - b, -1) for i, (b, e) in enumerate(zip(borders, ends, strict=True))])
    rows = rows + 0.05 * torch.randn(rows.shape, generator=generator)
    return rows.view(length, KV_HEADS, DIM).transpose(0, 1)[None].contiguous()


def test_a_predictor_that_knows_a_rule_cuts_by_it(tmp_path):
    path = save(tmp_path / "cosine.safetensors", {"all.": cosine_rule()}, heads="1")
    borders = [0, 23, 60, 95]
    key = topics(128, borders)
    assert running.cuts(piece(path, threshold=1.1), key)[0].nonzero()[:, 0].tolist() == borders[1:]
    params = {"block": 16, "unit": 1, "budget": 16 + 37, "chunks": "trained", "weights": path, "local": 16, "sinks": 0}
    query = key[:, :, 30:31].expand(-1, -1, 128, -1).contiguous()  # of the second topic
    kept = select(plan_of(**params), query, key).rows(0, 128, KV_HEADS, 128)[0, 0, -1]
    assert kept[23:60].all()
    assert kept.sum() == 16 + 37


def plan_of(layer=None, **params):
    form = FORMS["dhsa"]
    selector = form.selector(form.params(**params), causal_site(layer=layer))
    return Plan("dhsa", AttentionSpec(0.3 * s, k <= q + Nk - Nq, empty_rows="zero"), Sparsity(selector))


@pytest.mark.parametrize(("q_len", "k_len"), [(100, 100), (33, 90), (1, 64), (17, 17), (96, 40)])
def test_attention_is_over_what_the_definition_keeps(tmp_path, q_len, k_len):
    tensors = {number: random_tensors(seed=number) for number in (0, 3)}
    path = save(tmp_path / "layers.safetensors", {f"layers.{number}.": one for number, one in tensors.items()})
    query, key, value = made(k_len, batch=1)
    query = query[:, :, :q_len] if q_len <= k_len else made(q_len, batch=1)[0]
    params = {"block": 16, "unit": 1, "budget": 40, "chunks": "trained", "weights": path, "logit": 0.2, "local": 16,
              "sinks": 4}  # fmt: skip
    allowed = torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len
    form = FORMS["dhsa"]
    for layer, of_layer in tensors.items():
        bounds = bounds_of(Published(of_layer, 4, 4)(key[0]), 4, 0.2, 8, max(k_len // 16, 1) * 8)
        kept = form.reference(form.params(**params), query, key, allowed, 0.3, bounds) & allowed
        out, lse = portable.run(plan_of(layer, **params), query, key, value)
        wide_key, wide_value = (x.double().repeat_interleave(2, 1) for x in (key, value))
        scores = (query.double() @ wide_key.mT * 0.3).masked_fill(~kept, -torch.inf)
        assert_close(out, scores.softmax(-1).nan_to_num() @ wide_value, exact_dtype=False)
        assert_close(lse, scores.logsumexp(-1), exact_dtype=False)


def test_as_a_function(tmp_path):
    path = save(tmp_path / "cut.safetensors", {"all.": random_tensors()})
    params = {"block": 16, "unit": 1, "budget": 40, "chunks": "trained", "weights": path, "local": 16, "sinks": 4}
    query, key, value = made(90)
    out = effattn.attention(query, key, value, form="dhsa", scale=0.3, **params)
    assert_close(out, portable.run(plan_of(**params), query, key, value)[0])
    with pytest.raises(WeightsError, match="no such file"):
        effattn.attention(query, key, value, form="dhsa", **{**params, "weights": "absent.safetensors"})
    for wrong, reason in (({"weights": ""}, "belong together"), ({"unit": 16}, "unit must be 1")):
        with pytest.raises(OptionError, match=reason):
            effattn.attention(query, key, value, form="dhsa", **{**params, **wrong})


def test_a_plan_keeps_file_and_digest_and_another_file_is_refused(tmp_path):
    path = save(tmp_path / "cut.safetensors", {"all.": random_tensors()})
    params = {"block": 16, "unit": 1, "budget": 40, "chunks": "trained", "weights": path, "local": 16, "sinks": 4}
    plan = plan_of(5, **params)
    assert Plan.decode(plan.encode()) == plan
    assert (plan.sparsity.select.score.key.digest, plan.sparsity.select.score.key.layer) == (digest_of(path), 5)
    save(tmp_path / "cut.safetensors", {"all.": random_tensors(seed=9)})
    with pytest.raises(WeightsError, match="not the file with which the model was compiled"):
        portable.run(plan, *made(90))
    assert plan_of(5, **params) != plan


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    path = tmp_path / "wrong.safetensors"

    def loaded(layer=0, kv_heads=KV_HEADS, dim=DIM):
        return boundary_weights.load(str(path), digest_of(path), layer, kv_heads, dim)

    good = random_tensors()
    save(path, {"layers.1.": good})
    assert loaded(1).heads == 4
    with pytest.raises(WeightsError, match="holds no predictor for layer 0; there are some for layers 1"):
        loaded()
    with pytest.raises(WeightsError, match="the number of this layer is not known"):
        loaded(None)
    with pytest.raises(WeightsError, match=r"for keys of 16 numbers, here they have 32 \(2 key heads of 16\)"):
        loaded(1, dim=16)
    cases = (
        ({"other.": good}, {}, "holds no boundary predictor"),
        ({"all.": {**good, "enc.norm.bias": torch.zeros(3)}}, {}, r"'all.enc.norm.bias' has shape \[3\].*needs \[16\]"),
        ({"all.": {**good, "mlp.2.bias": torch.zeros(1, dtype=torch.int32)}}, {}, "torch.int32; allowed"),
        ({"all.": {**good, "mlp.2.bias": torch.tensor([torch.nan])}}, {}, "not finite"),
        ({"all.": {**good, "pool.gate.weight": torch.zeros(2, 16)}}, {}, r"'all.pool.gate.weight' has shape \[2, 16\]"),
        ({"all.": {**good, "mlp.0.bias": torch.zeros(())}}, {}, "'all.mlp.0.weight' has shape"),
        ({"all.": good}, {"heads": "3"}, "do not divide among 3 heads"),
        ({"all.": good}, {"heads": "0"}, "'heads' in its metadata is '0'"),
        ({"all.": good}, {"heads": "²"}, "'heads' in its metadata is"),
        ({"all.": good}, {"window": "1000"}, "'window' in its metadata is '1000'.*from 1 to 64"),
    )
    for tensors, metadata, reason in cases:
        save(path, tensors, **metadata)
        with pytest.raises(WeightsError, match=reason) as caught:
            loaded()
        assert str(path) in str(caught.value)
    for name in good:
        save(path, {"all.": {other: tensor for other, tensor in good.items() if other != name}})
        with pytest.raises(WeightsError, match=f"no tensor 'all.{name}', which the boundary predictor needs"):
            loaded()
    safetensors.save_file({"all." + name: tensor for name, tensor in good.items()}, path)
    with pytest.raises(WeightsError, match="'heads' in its metadata is absent"):
        loaded()
    path.write_bytes(b"\x80\x04pickled?")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        loaded()


def test_layers_that_share_a_predictor_share_its_memory(tmp_path):
    path = save(tmp_path / "cut.safetensors", {"all.": random_tensors()})
    first, second = (
        boundary_weights.on_device(path, digest_of(path), layer, KV_HEADS, DIM, torch.device("cpu")) for layer in (0, 7)
    )
    assert first is second
