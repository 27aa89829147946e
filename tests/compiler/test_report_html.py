"""The HTML report: everything is told, nothing is executed, nothing is fetched."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest

from effattn.compiler.report.html import render

ATTACK = "<script>alert('x')</script>\" onload=\"x"


def site(**changes):
    body = {
        "name": "attention_0",
        "layer": 0,
        "stage": "prefill",
        "found_as": "sdpa",
        "form": "exact",
        "exact": True,
        "predicate": "k <= q & q - k < 4096",
        "score": "s*0.125",
        "reason": "policy allows only exact",
        "candidates": [{"form": "exact", "accepted": True, "reasons": []}],
        "kernel": None,
        "location": "modeling_llama.py:201",
        "layout": "B 1, heads 9/3, N 512 x 512, D 64",
        "empty_rows": "never",
        "notes": [],
    }
    return body | changes


REPORT = {
    "versions": {"effattn": "0.1.0", "torch": "2.13.0"},
    "policy": {"name": "power", "toml": 'schema = 1\nname = "power"\n'},
    "seconds": {"match": 0.01234, "rewrite": 1},
    "sites": [
        site(),
        site(name="attention_1", layer=1, replaced=False),
        site(
            name="attention_2",
            layer=None,
            form="window",
            params={"window": 2048, "sinks": 4},
            exact=False,
            kernel="/cache/window.py",
            empty_rows="mean",
            notes=["grouped heads folded back"],
            candidates=[
                {"form": "power", "accepted": False, "reasons": ["no position", "needs causal"]},
                {"form": "window", "accepted": True, "reasons": []},
            ],
        ),
    ],
    "missed": [{"name": "softmax_9", "location": "m.py:3", "reason": "live dropout", "hint": "call eval()"}],
    "graphs": [
        {"before": "", "after": "", "failure": "KeyError: oops"},
        {"before": "def forward(a): return a < 1", "after": "def forward(b): ..."},
    ],
    "stanza": '[[rule]]\nlayers = "0-1"\n',
}


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.open, self.rows, self.text, self.attributes = [], 0, [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.rows += tag == "tr"
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_tells_everything():
    page = render(REPORT)
    tags = Tags(page)
    assert tags.open == []  # every tag is closed
    text = re.sub(r"\s+", " ", "".join(tags.text))
    for word in (
        "3 attentions found, 2 replaced, 2 left alone; 2 exact and 1 approximate.",
        "Policy: power · effattn 0.1.0 · torch 2.13.0",
        "match 0.0123 s · rewrite 1 s",
        "k <= q & q - k < 4096",
        "modeling_llama.py:201",
        "/cache/window.py",
        "power: no position; needs causal",
        "window: applies",
        "grouped heads folded back",
        "a row without keys gives: mean",
        "live dropout",
        "window 2048, sinks 4",
        "was left as it was: KeyError: oops",
        "call eval()",
        "def forward(a): return a < 1",
        'layers = "0-1"',
        'name = "power"',
    ):
        assert word in text
    assert "None" not in text
    assert tags.rows == (1 + 2) + (1 + 3) + (1 + 1)  # in short, sites, left alone


def attack(value):
    if isinstance(value, dict):
        return {key: attack(item) for key, item in value.items()}
    if isinstance(value, list):
        return [attack(item) for item in value]
    return ATTACK if isinstance(value, str) else value


def test_everything_is_escaped():
    page = render(attack(REPORT))
    tags = Tags(page)
    assert not any(tag == "script" for tag, *_ in tags.attributes)
    assert "<script" not in page
    assert not any(name.startswith("on") for _, name, _ in tags.attributes)
    assert html.escape(ATTACK, quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page


def test_nothing_is_fetched():
    page = render(REPORT)
    assert "http://" not in page
    assert "https://" not in page
    assert not any(name in ("src", "href") for _, name, _ in Tags(page).attributes)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({}, "0 attentions found, 0 replaced, 0 left alone"),
        ({"sites": [], "missed": [{}, {"attention": False}]}, "0 attentions found, 0 replaced, 1 left alone"),
        ({"sites": [{"name": "a"}]}, "1 attention found, 1 replaced, 0 left alone"),
    ],
)
def test_little_to_tell(report, words):
    tags = Tags(render(report))
    assert words in re.sub(r"\s+", " ", "".join(tags.text))
