"""Costs of forms, where one becomes cheaper than another, and the choice by length that a policy may ask for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled

import effattn
from effattn.errors import PolicyError
from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import k, q, s
from effattn.ir.plan import Dispatch, Plan
from effattn.ir.site import Layout, Site
from effattn.lowering.cost import LONGEST, ladder, pairs
from effattn.lowering.device import CPU, DEVICES, OTHER_GPU, device_named
from effattn.lowering.forms import FORMS
from effattn.passes.choose import cheapest as cheapest_pass

FOURTH = {"stride": 4, "key_stride": 4}
LLAMA = Layout(1, 32, 8, 131072, 131072, 128, 128)
H100 = device_named("NVIDIA H100 80GB HBM3")


def site(**changes) -> Site:
    body = {
        "name": "attention", "found_as": "sdpa", "stage": "prefill", "layout": LLAMA, "hints": LLAMA,
        "spec": AttentionSpec(s, k <= q, empty_rows="never"), "position": q,
        "dtype": "bfloat16", "device": "cuda", "needs_grad": False, "output_layout": "bhnd",
    }  # fmt: skip
    return Site(**{**body, **changes})


def milliseconds(form: str, length: int, rows: int | None = None, **params) -> float:
    cost = FORMS[form].cost(site(), FORMS[form].params(**params))
    return 1e3 * cost.seconds(H100, "bfloat16", length if rows is None else rows, length)


@pytest.mark.parametrize("kept", [1, 7, 100, 1000])
@pytest.mark.parametrize(("rows", "keys"), [(50, 50), (13, 50), (300, 300)])
def test_pairs_are_counted(kept, rows, keys):
    exact = sum(min(place + 1, kept) for place in range(keys - rows, keys))
    from effattn.ir.expr import Nk, Nq

    assert float(pairs(kept).subs({Nq: rows, Nk: keys})) == pytest.approx(exact, abs=rows)


def test_predictions_are_what_was_measured():
    """cuDNN's causal attention at 8B shape on an H100: 249 ms at 131,072 keys and 14.8 ms at 32,768."""
    assert milliseconds("exact", 131072) == pytest.approx(249, rel=0.1)
    assert milliseconds("exact", 32768) == pytest.approx(14.8, rel=0.1)
    assert milliseconds("power", 131072) == pytest.approx(14.8, rel=0.15)


def test_selections_are_predicted_roughly():
    """At 131,072 keys, 32 and 8 heads of 64, on an H100 (benchmarks/results/selectors.json)."""
    layout = Layout(1, 32, 8, 131072, 131072, 64, 64)
    for form, params, measured in (("proxy", FOURTH, 5.7), ("proxy", {**FOURTH, "groups": 1}, 1.5), ("dhsa", {}, 4.3)):
        selector = FORMS[form].cost(site(layout=layout, hints=layout), FORMS[form].params(**params)).selector
        predicted = 1e3 * selector.seconds(H100, H100.scored, "bfloat16", 131072, 131072)
        assert predicted == pytest.approx(measured, rel=0.35), form


def test_a_decode_step_reads_memory():
    """One query over 131,072 keys: 193 us with SDPA; the window reads 2,176 of them."""
    assert milliseconds("exact", 131072, rows=1) == pytest.approx(0.193, rel=0.1)
    assert milliseconds("window", 131072, rows=1) < 0.02


@pytest.mark.parametrize("form", [name for name in FORMS if name != "exact"])
def test_the_selector_is_apart(form):
    cost = FORMS[form].cost(site(), FORMS[form].params())
    flops, moved = cost.selector.at(131072, 131072)
    assert (flops > 0 and moved > 0 and cost.selector.launches > 1) == (FORMS[form].select is not None)
    assert flops < 0.02 * FORMS["exact"].cost(site(), FORMS["exact"].params()).attention.at(131072, 131072)[0]


def test_devices():
    assert device_named("NVIDIA H200").source == "measured"
    assert device_named("NVIDIA Z9000") is OTHER_GPU
    assert device_named("cpu") is CPU
    assert all(row.source in ("measured", "datasheet") for row in DEVICES)


def test_ladder():
    costs = {"a": lambda n: n, "b": lambda n: 100 + n / 2, "c": lambda n: 1000 + n / 100}
    assert ladder(costs) == ((1, "a"), (201, "b"), (1837, "c"))
    assert ladder(costs, 500) == ((500, "b"), (1837, "c"))
    assert ladder({"a": lambda n: n, "b": lambda n: n}) == ((1, "a"),)
    assert ladder({"a": lambda n: 1, "b": lambda n: 0 if n == LONGEST else 2}) == ((1, "a"), (LONGEST, "b"))


def test_steps_below_the_least_length_are_exact():
    costs = {"exact": FORMS["exact"].cost(site(), FORMS["exact"].params())}
    found = cheapest_pass.Cheapest(((1, "exact"), (100, "window"), (900, "power")), costs, H100, site())
    assert found.steps_from(0) == ((1, "exact"), (100, "window"), (900, "power"))
    assert found.steps_from(500) == ((1, "exact"), (500, "window"), (900, "power"))
    assert found.steps_from(1000) == ((1, "exact"), (1000, "power"))
    assert found.steps_from(50) == ((1, "exact"), (100, "window"), (900, "power"))


def test_a_plan_of_several_forms_decides_by_length():
    window, power = (FORMS[name] for name in ("window", "power"))
    low = Plan(
        "window", AttentionSpec(s, k <= q, window.keep(window.params(), site())), dispatch=Dispatch(min_length=100)
    )
    plan = Plan(
        "power",
        AttentionSpec(s, k <= q, power.keep(power.params(), site())),
        dispatch=Dispatch(min_length=900, below=low),
    )
    assert [plan.at(length).form for length in (1, 99, 100, 899, 900)] == [
        "exact",
        "exact",
        "window",
        "window",
        "power",
    ]
    assert Plan.decode(plan.encode()) == plan


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_the_policy_asks_for_the_cheapest(monkeypatch):
    """On an H100: exact for short calls, then the window; one graph serves both, and the report says where."""
    monkeypatch.setattr(cheapest_pass, "device_named", lambda name: H100)
    params = {"window": {"window": 64, "sinks": 4}, "power": {"block": 16, "window": 64, "sinks": 16}}
    asked = {"rule": [{"forms": ["auto", "power", "window"], "params": params}]}
    q, k, v = (torch.randn(1, 32, 300, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    with torch.no_grad():
        report, out = compiled(attention, q, k, v, policy=asked)
        chosen = report.sites[0]
        assert chosen.form == "window"
        assert "the cheapest: exact, window from" in chosen.reason
        assert "NVIDIA H100, measured figures" in chosen.reason
        first = int(chosen.reason.split("window from ")[1].split(" keys")[0].replace(",", ""))
        assert 1 < first < 4096
        kept = effattn.attention(q, k, v, form="window", **params["window"])
        assert_close(out, kept if first <= 300 else attention(q, k, v))


def test_exact_stays_where_nothing_is_cheaper(monkeypatch):
    monkeypatch.setattr(cheapest_pass, "device_named", lambda name: H100)
    asked = {"rule": [{"forms": ["auto", "proxy"], "params": {"proxy": {"least": 1 << 25}}}]}
    with torch.no_grad():
        report, _ = compiled(attention, *(torch.randn(1, 4, 64, 16) for _ in range(3)), policy=asked)
    assert report.sites[0].form == "exact"
    assert "cheapest at every length" in report.sites[0].reason


@pytest.mark.parametrize(
    ("forms", "says"),
    [
        (["auto"], "needs forms to choose from"),
        (["auto", "exact"], "needs forms to choose from"),
        (["power", "auto"], "comes first"),
        (["auto", "powr"], "did you mean 'power'"),
    ],
)
def test_wrong_uses_of_auto(forms, says):
    with pytest.raises(PolicyError, match=says):
        effattn.Policy.of({"rule": [{"forms": forms}]})
