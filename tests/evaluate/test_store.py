"""The folder of an evaluation: what is read back, what is measured again, what is an error."""

from __future__ import annotations

import json

import pytest
from evaluating import Heard

from effattn.errors import EvaluationError
from effattn.evaluate.records import PrefillTime, TextLoss
from effattn.evaluate.store import Store, differences

SETTING = {"lengths": [64], "policies": [{"name": "exact"}], "model": {"name": "tiny", "weights": "a"}}
LOSS = TextLoss(length=64, policy="exact", segment=0, loss=1.5, tokens=63, seconds=0.25)


def opened(folder, setting=SETTING):
    heard = Heard()
    return Store(folder, setting, heard.say), heard.said


@pytest.fixture
def folder(tmp_path):
    """With one finished piece."""
    opened(tmp_path / "out")[0].put("perplexity-64-policy0-0", LOSS)
    return tmp_path / "out"


def test_what_was_put_is_there(folder):
    store, said = opened(folder)
    assert store.get("perplexity-64-policy0-0", TextLoss) == LOSS
    assert store.get("perplexity-64-policy0-1", TextLoss) is None
    assert (store.reused, said) == (1, [])
    assert not list(folder.rglob("*.part"))


def test_without_a_folder_pieces_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, _ = opened(None)
    store.put("time-64-dense", LOSS)
    assert store.get("time-64-dense", TextLoss) == LOSS
    assert list(tmp_path.iterdir()) == []


SPOILT = {
    "truncated": lambda good: json.dumps(good)[:-20],
    "empty": lambda good: "",
    "other evaluation": lambda good: json.dumps({**good, "fingerprint": "0" * 16}),
    "other piece": lambda good: json.dumps({**good, "piece": "perplexity-64-policy0-1"}),
    "unknown field": lambda good: json.dumps({**good, "result": {**good["result"], "code": "__import__('os')"}}),
    "text for a number": lambda good: json.dumps({**good, "result": {**good["result"], "loss": "1.5"}}),
    "not finite": lambda good: json.dumps({**good, "result": {**good["result"], "loss": float("nan")}}),
    "no result": lambda good: json.dumps({**good, "result": None}),
    "nested": lambda good: "[" * 100_000,
    "a list": lambda good: "[1, 2]",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_piece_is_measured_again(folder, how):
    path = folder / "pieces" / "perplexity-64-policy0-0.json"
    path.write_text(SPOILT[how](json.loads(path.read_text())))
    store, said = opened(folder)
    assert store.get("perplexity-64-policy0-0", TextLoss) is None
    (told,) = said
    assert told.startswith("perplexity-64-policy0-0.json")
    assert told.endswith("measured again")
    store.put("perplexity-64-policy0-0", LOSS)
    assert opened(folder)[0].get("perplexity-64-policy0-0", TextLoss) == LOSS


def test_another_kind_of_result_is_none(folder):
    store, said = opened(folder)
    assert store.get("perplexity-64-policy0-0", PrefillTime) is None
    assert "is not a result" in said[0]


def test_links_are_not_followed(folder, tmp_path):
    path = folder / "pieces" / "perplexity-64-policy0-0.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    store, said = opened(folder)
    assert store.get("perplexity-64-policy0-0", TextLoss) is None
    assert "not a regular file" in said[0]
    store.put("perplexity-64-policy0-0", LOSS)
    assert not path.is_symlink()


def test_another_setting_begins_anew(folder):
    (folder / "notes.txt").write_text("mine")
    store, said = opened(folder, {**SETTING, "lengths": [64, 96]})
    (told,) = said
    assert "begins anew" in told
    assert "lengths: [64] -> [64, 96]" in told
    assert store.get("perplexity-64-policy0-0", TextLoss) is None
    assert list((folder / "pieces").iterdir()) == []
    assert (folder / "notes.txt").read_text() == "mine"
    assert opened(folder, {**SETTING, "lengths": [64, 96]})[1] == []


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(EvaluationError, match=r"thesis\.txt.*no setting\.json"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(EvaluationError, match="cannot use the folder"):
        opened(tmp_path / "thesis.txt")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', '{"format": "effattn evaluation 1"}'])
def test_a_broken_setting_is_an_error(folder, content):
    (folder / "setting.json").write_text(content)
    with pytest.raises(EvaluationError, match="nothing was touched"):
        opened(folder)
    assert (folder / "pieces" / "perplexity-64-policy0-0.json").exists()


def test_what_changed_in_words():
    now = {"lengths": [64], "policies": [{"name": "power"}], "model": {"name": "tiny", "weights": "b"}, "seed": 1}
    assert differences(SETTING, now) == [
        'model.weights: "a" -> "b"',
        'policies: ["exact"] -> ["power"]',
        "seed: null -> 1",
    ]
