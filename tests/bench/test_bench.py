"""Attention timed by effattn and its peers: what is computed is the same, and what cannot be is said."""

from __future__ import annotations

import itertools
import json
import time
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch

from effattn.bench import clock, run
from effattn.bench.mods import MASKS, SCORES, Chosen, chosen, fields
from effattn.bench.peers import PEERS, Given, Peer
from effattn.bench.problem import BenchError, Mod, Pairs, Problem, flops, traffic
from effattn.bench.roofline import draw
from effattn.bench.show import heading, left_out, tables

SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32", "device": "cpu"}


def none_of_them(name):
    raise AssertionError(name)


def problem(mask: str = "causal", score: str = "none", tokens: int = 70, **sizes) -> Problem:
    asked = fields(chosen("mask", mask, MASKS, none_of_them), chosen("score", score, SCORES, none_of_them))
    return Problem(tokens=tokens, **{**SIZES, **sizes}, **asked)


def measured(one: Problem, *names: str, backward: bool = False) -> dict[tuple[str, str], run.Row]:
    done = run.bench([one], [PEERS[name] for name in names], backward=backward, seconds=0.0)
    return {(row.direction, row.peer): row for row in done.rows}


@pytest.mark.parametrize("mask", ["causal", "full", "padding:20", "documents:30", "window:9"])
def test_masks(mask):
    """As many pairs as the definition has, and the same result from all."""
    one = problem(mask)
    rows = measured(one, "effattn", "SDPA", "eager")
    for name in ("SDPA", "eager"):
        row = rows["forward", name]
        assert not row.wrong, row
        assert row.difference is not None
        assert row.ms > 0
        assert row.over_effattn == row.ms / rows["forward", "effattn"].ms
    places = torch.arange(70)
    q, k = places[:, None], places[None]
    batches = {
        "causal": [k <= q],
        "full": [k == k + 0 * q],
        "padding:20": [(k <= q) & (k >= 20), (k <= q) & (k >= 10)],
        "documents:30": [(k <= q) & (k // 30 == q // 30)],
        "window:9": [(k <= q) & (q - k < 9)],
    }[mask]
    density = sum(int(allowed.sum()) for allowed in batches) / (len(batches) * 70 * 70)
    assert Pairs.of(one, one.make_mask(one)).density == pytest.approx(density)


@pytest.mark.parametrize("score", ["softcap:5", "alibi", "table", "learned-table"])
def test_scores(score):
    rows = measured(problem(score=score), "effattn", "eager", "SDPA")
    assert rows["forward", "SDPA"].why_not == "computes no such score"
    assert rows["forward", "eager"].difference is not None
    assert not rows["forward", "eager"].wrong


def test_the_form_power():
    """With fewer tokens than its window it is causal attention."""
    rows = measured(problem("power"), "effattn", "eager")
    assert not rows["forward", "eager"].wrong


def test_backward():
    rows = measured(problem("window:9"), "effattn", "SDPA", "eager", backward=True)
    assert set(rows) == {(way, peer) for way in ("forward", "backward") for peer in ("effattn", "SDPA", "eager")}
    for row in rows.values():
        assert row.error is None
        assert not row.wrong


def test_queries_without_keys_in_a_backward():
    rows = measured(problem("padding:20"), "effattn", "SDPA", "eager", backward=True)
    for row in rows.values():
        assert row.error is None
        assert not row.wrong, row


def test_attention_that_is_left_alone_is_no_figure():
    def rounded(s, b, h, q, k):
        return s.round()  # no operation of scores

    one = replace(problem(), score="rounded", make_score=lambda _: Mod(rounded))
    row = measured(one, "effattn")["forward", "effattn"]
    assert row.ms is None
    assert row.error is not None


def test_another_result_is_noticed():
    wrong = replace(
        PEERS["SDPA"], name="other", make=lambda given: lambda q, k, v: 1.1 * PEERS["SDPA"].make(given)(q, k, v)
    )
    nothing = replace(wrong, name="NaN", make=lambda given: lambda q, k, v: q * float("nan"))
    done = run.bench([problem()], [PEERS["effattn"], PEERS["SDPA"], wrong, nothing], seconds=0.0)
    assert [row.wrong for row in done.rows] == [False, False, True, True]


def test_one_that_fails_does_not_stop_the_others():
    def fails(given):
        raise RuntimeError("no such kernel\nand more")

    done = run.bench([problem()], [Peer("bad", lambda given: None, fails), PEERS["SDPA"]], seconds=0.0)
    assert done.rows[0].error == "RuntimeError: no such kernel"
    assert done.rows[1].ms > 0


def test_a_mask_tensor_that_is_too_large_is_not_made():
    one = problem("documents:5000", tokens=131_072)
    given = Given(one, one.make_mask(one), None, False)
    assert "needs a mask of 32 GiB" in PEERS["SDPA"].why_not(given)
    assert "needs scores of" in PEERS["eager"].why_not(given)


def test_peers_on_a_gpu():
    """What is compared with what, without a GPU: the reasons alone."""
    plain, masked = (replace(problem(mask), device="cuda", dtype="bfloat16") for mask in ("causal", "window:9"))
    left = {
        one.mask: [name for name, peer in PEERS.items() if peer.why_not(Given(one, None, None, False)) is not None]
        for one in (plain, masked)
    }
    assert left["causal"] == ["SDPA", "SDPA cuDNN, plain causal"]
    assert {"SDPA flash", "SDPA cuDNN"} <= set(left["window:9"])
    assert "SDPA cuDNN, plain causal" not in left["window:9"]


def test_work():
    one = problem(tokens=64)
    assert flops(one, 0.5, backward=False) == 2 * 2 * 2 * 4 * 64 * 32 * 16
    assert flops(one, 0.5, backward=True) == 2.5 * flops(one, 0.5, backward=False)
    assert traffic(one, backward=False) == 4 * 2 * 64 * 16 * (4 + 2 + 2 + 4)


@pytest.mark.parametrize(
    ("what", "text", "message"),
    [
        ("mask", "windw", "unknown mask 'windw'"),
        ("mask", "causal:3", "takes no number"),
        ("mask", "window:x", "takes a number, as in window:1024"),
        ("mask", "window:0", "above 0"),
        ("score", "softcap:-1", "above 0"),
        ("score", "softcap:nan", "above 0"),
        ("score", "causal", "unknown score"),
    ],
)
def test_names_that_are_wrong(what, text, message):
    with pytest.raises(BenchError, match=message):
        chosen(what, text, MASKS if what == "mask" else SCORES, none_of_them)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"heads": 3}, "no multiple"), ({"tokens": 0}, "tokens must be"), ({"dtype": "int8"}, "unknown dtype")],
)
def test_sizes_that_are_wrong(sizes, message):
    with pytest.raises(BenchError, match=message):
        problem(**sizes)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda b, h, q: q, "must take b, h, q_idx, kv_idx"),
        (lambda b, h, q, k: q - k, "must return a tensor of torch.bool"),
        (lambda b, h, q, k: True, "must return a tensor of torch.bool, got bool"),
        (lambda b, h, q, k: torch.ones(3)[q, k] > 0, "failed: IndexError"),
    ],
)
def test_masks_of_users_that_are_wrong(function, message):
    found = chosen("mask", "mine.py:mask", MASKS, lambda name: function)
    with pytest.raises(BenchError, match=message):
        found.make(problem())


def test_masks_of_users():
    stride = chosen("mask", "mine:stride", MASKS, lambda name: lambda b, h, q, k: (k <= q) & ((q - k) % 3 == 0))
    one = replace(problem(), mask=stride.text, make_mask=stride.make, causal=None)
    rows = measured(one, "effattn", "eager")
    assert rows["forward", "effattn"].error is None
    assert not rows["forward", "eager"].wrong
    assert isinstance(stride, Chosen)


def test_tables_json_and_picture(tmp_path):
    done = run.bench([problem(tokens=n) for n in (20, 40)], list(PEERS.values()), backward=True, seconds=0.0)
    body = json.loads(json.dumps(done.to_dict()))
    assert body["about"]["setting"]["mask"] == "causal"
    assert len(body["rows"]) == 2 * 2 * len(PEERS)
    made = list(tables(done))
    assert [table.row_count for table in made] == [3] * 4
    assert "heads 4/2, D 16" in heading(done)
    assert {peer for peer, _ in left_out(done)} == {name for name in PEERS if "SDPA " in name or "Flex" in name}
    for name in ("roof.svg", "roof.html"):
        draw(done, tmp_path / name)
    points = ET.fromstring((tmp_path / "roof.svg").read_text()).findall(".//{*}circle/{*}title")
    assert len(points) == 3 * 2 * 2
    assert (tmp_path / "roof.html").read_text().startswith("<!doctype html>")
    with pytest.raises(BenchError, match="svg or"):
        draw(done, tmp_path / "roof.png")
    with pytest.raises(BenchError, match="cannot write"):
        draw(done, tmp_path / "nowhere" / "roof.svg")


def test_functions_are_timed_in_turns():
    calls: list[str] = []
    functions = [lambda: calls.append("a"), lambda: calls.append("b") or time.sleep(0.001)]
    first, second = clock.timed(functions, torch.device("cpu"), seconds=0.01)
    warm, timed = calls[:2], calls[2:]
    assert warm == ["a", "b"]
    assert timed.count("a") == first.runs
    assert timed.count("b") == second.runs
    turns = [name for name, _ in itertools.groupby(timed)]
    assert len(turns) >= 2 * clock.FEWEST
    assert first.fastest <= first.median
    assert second.fastest >= 1.0  # ms


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_what_fails_while_it_is_timed_is_told(fails_at):
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("no memory")

    bad, good = clock.timed([fails, lambda: None], torch.device("cpu"), seconds=0.0)
    assert isinstance(bad, RuntimeError)
    assert good.runs == clock.FEWEST
    assert len(calls) == fails_at  # it is left alone then


def test_options_are_tried_where_a_peer_fails_by_its_own_choice():
    def make(given):
        def run(q, k, v):
            if given.options.get("tiles") != 32:
                raise RuntimeError(f"no room for {dict(given.options)}")
            return PEERS["SDPA"].make(given)(q, k, v)

        return run

    peer = Peer("large", lambda given: None, make, ({"tiles": 64}, {"tiles": 32, "stages": 1}))
    (row,) = run.bench([problem()], [peer], seconds=0.0).rows
    assert (row.error, row.options) == (None, "tiles 32, stages 1")
    assert row.ms > 0
    (row,) = run.bench([problem()], [replace(peer, fallbacks=({"tiles": 64},))], seconds=0.0).rows
    assert row.error == "RuntimeError: no room for {}"  # the first says best what is wrong
    (row,) = measured(problem(), "SDPA").values()
    assert row.options is None
