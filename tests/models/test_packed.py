"""Policies on packed text, as transformers masks it: each document is as on its own."""

from __future__ import annotations

import pytest
import torch
from architectures import llama, tokens
from comparing import assert_close

from effattn.compiler.options import Options
from effattn.compiler.report import collect

LENGTHS = (23, 9, 70)
FORMS = {
    "window": {"window": 7, "sinks": 3},
    "power": {"block": 16, "window": 16, "sinks": 5},
}


@torch.no_grad()
def run(model, form, **given):
    options = {"rest": "eager", "strict": True, "policy": {"rule": [{"forms": [form], "params": {form: FORMS[form]}}]}}
    torch._dynamo.reset()
    with collect.listening() as heard:
        logits = torch.compile(model, backend="effattn", options=options)(**given, use_cache=False).logits
    return logits, heard.report(Options.read(options)).sites


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_each_document_is_as_on_its_own(form, attention):
    model, text = llama(attention), tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    out, sites = run(model, form, input_ids=text, position_ids=positions)
    alone = [run(model, form, input_ids=part)[0] for part in text.split(LENGTHS, dim=1)]
    assert_close(out, torch.cat(alone, dim=1), 1e-5)
    for site in sites:
        assert site.form == form
        assert site.predicate.startswith("k <= q & ")
        assert "counted from the first key that each query may see" in site.reason
    with torch.no_grad():
        exact = model(input_ids=text, position_ids=positions, use_cache=False).logits
    assert (out - exact).abs().max() > 1e-4  # the policy leaves out keys
