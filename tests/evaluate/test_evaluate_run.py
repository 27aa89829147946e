"""The whole of ``evaluate`` on a tiny model: figures, what is written, what is not done twice."""

from __future__ import annotations

import struct

import pytest
import torch
from evaluating import CONTEXT, POWER, Characters, Heard, ids, llama, policy

from effattn.compiler.capture import Tapped
from effattn.errors import EvaluationError
from effattn.evaluate import Evaluation, density_of, evaluate, perplexity
from effattn.evaluate import run as running
from effattn.evaluate.show.tables import attention, tables, whole_model

POLICIES = ("exact", policy("power", **POWER))


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """(evaluation, folder, what was heard) of all tasks."""
    folder, heard = tmp_path_factory.mktemp("whole") / "out", Heard()
    return run(model, folder, heard), folder, heard


def run(model, folder, heard=False, policies=POLICIES, **changes):
    given = {"lengths": (384, 512), "depths": (0, 1), "trials": 2, "segments": 2, "repeats": 1, "text": ids(1024)}
    return evaluate(model, Characters(), policies, **{**given, **changes}, out=folder, progress=heard)


def not_again(*args, **kwargs):
    raise AssertionError("this is finished, and was begun again")


def test_every_piece_is_there(whole):
    done, folder, heard = whole
    assert [(site.length, site.layer) for site in done.sites] == [(384, 0), (384, 1), (512, 0), (512, 1)]
    assert len(done.losses) == 2 * 2 * 3
    assert len(done.passkeys) == 2 * 2 * 2 * 3
    assert len(done.times) == 2 * 3
    assert heard.finished == pytest.approx(heard.total)
    assert any("takes about" in line for line in heard.said)
    assert Evaluation.load(folder / "results.json") == done
    about = done.about
    assert about["policies"][1]["rule"][0]["params"]["power"] == POWER
    assert {"date", "device", "versions", "model", "text", "seed", "lengths"} <= set(about)


def test_exact_is_dense_and_approximations_are_not(whole, model):
    done = whole[0]
    losses = {(loss.length, loss.policy, loss.segment): loss.loss for loss in done.losses}
    for segment in (0, 1):
        plain = perplexity(model, ids(1024)[:, 384 * segment : 384 * (segment + 1)]).loss
        assert losses[384, "dense", segment] == pytest.approx(plain, abs=1e-5)
        assert losses[384, "exact", segment] == pytest.approx(plain, abs=1e-5)
        assert abs(losses[384, "power", segment] - plain) > 1e-5
    for site in done.sites:
        exact, power = site.forms
        assert exact.error < 1e-5
        assert exact.mass == pytest.approx(1.0, abs=1e-5)
        assert power.error > 1e-3
        assert power.density == pytest.approx(density_of("power", site.length, POWER), abs=1e-12)
        assert power.oracle_mass >= power.mass - 1e-6
    known = {(item.length, item.policy): item.density for item in done.densities}
    assert known[512, "power"] == pytest.approx(density_of("power", 512, POWER))


def test_passkeys_are_the_same_for_all_policies(whole):
    done = whole[0]
    hidden = {}
    for item in done.passkeys:
        assert item.tokens <= item.length
        assert hidden.setdefault((item.length, item.depth, item.trial), item.key) == item.key
    answers = {(item.policy, item.length, item.depth, item.trial): item.answer for item in done.passkeys}
    for (who, *place), text in answers.items():
        if who == "exact":
            assert text == answers["dense", *place]


def test_a_second_call_does_nothing_again(whole, model, monkeypatch):
    done, folder, _ = whole
    monkeypatch.setattr(Tapped, "run", not_again)
    monkeypatch.setattr(running, "perplexity", not_again)
    monkeypatch.setattr(running, "timed", not_again)
    monkeypatch.setattr(running.keys, "answer", not_again)
    heard = Heard()
    again = run(model, folder, heard)
    assert again.model_dump(exclude={"about"}) == done.model_dump(exclude={"about"})
    assert any("pieces were read" in line for line in heard.said)


def test_the_picture_is_a_png(whole):
    image = pytest.importorskip("matplotlib.image")
    path = whole[1] / "picture.png"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    assert image.imread(path).shape[:2] == (height, width)
    assert width > 1000


def test_tables(whole):
    done = whole[0]
    for table, names in ((whole_model(done), ("dense", "exact", "power")), (attention(done), ("exact", "power"))):
        assert [line[:2] for line in table.lines] == [(length, who) for length in ("384", "512") for who in names]
    text = str(done)
    for made in tables(done):
        assert made.title in text
        assert made.markdown().count("\n") == len(made.lines) + 1
    assert "+0.00%" in text


def test_a_run_that_was_cut_off_goes_on(model, tmp_path, monkeypatch):
    count, measured = 0, running.perplexity

    def cut(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(running, "perplexity", cut)
    small = {"lengths": (64,), "tasks": ("perplexity",), "segments": 2}
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", **small)
    assert run(model, tmp_path / "out", **small).losses[2].policy == "exact"
    assert count == 3 + 4


def test_results_of_something_else_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"about": {}, "sites": 5}')
    with pytest.raises(EvaluationError, match="holds no results"):
        Evaluation.load(tmp_path / "results.json")
    with pytest.raises(EvaluationError, match="holds no results"):
        Evaluation.load(tmp_path / "nothing.json")


def test_beyond_the_context_with_scaled_positions(model):
    before = model.model.rotary_emb
    done = evaluate(
        model, None, ("exact",), lengths=(CONTEXT + 1,), tasks=("perplexity",), text=ids(2048), rope_scaling="yarn:2"
    )
    assert done.about["rope_scaling"] == "yarn:2"
    assert done.losses[0].loss == pytest.approx(done.losses[1].loss, abs=1e-5)
    plain = perplexity(model, ids(2048)[:, : CONTEXT + 1]).loss
    assert abs(done.losses[0].loss - plain) > 1e-7
    assert model.model.rotary_emb is before
    assert model.config.max_position_embeddings == CONTEXT
    assert torch.equal(before.inv_freq, llama().model.rotary_emb.inv_freq)


class Linear(torch.nn.Module):
    """A layer's attention without a softmax."""

    def __init__(self, width):
        super().__init__()
        self.projections = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden_states, **kwargs):
        query, key, value = (one(hidden_states).unflatten(-1, (2, -1)).transpose(1, 2) for one in self.projections)
        return ((query @ key.mT).tril() @ value / 64).transpose(1, 2).flatten(2), None


def test_attention_without_a_softmax_is_listed(tmp_path):
    model, heard = llama(), Heard()
    model.model.layers[0].self_attn = Linear(model.config.hidden_size)
    done = run(model, tmp_path / "out", heard, lengths=(256,), tasks=("errors",))
    linear, softmax = done.sites
    assert {(one.form, one.error, one.density) for one in linear.forms} == {("linear", 0.0, 1.0)}
    assert "power refused" in linear.forms[1].reason
    assert [one.form for one in softmax.forms] == ["exact", "power"]
    assert softmax.forms[1].error > 0
    assert any("1 of 2 attentions have no softmax" in line for line in heard.said)
