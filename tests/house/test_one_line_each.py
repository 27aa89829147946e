"""The walks of docs/architecture.md, as they stand there: one file and one line, and all parts know what is new."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
import sys
from dataclasses import replace

import pytest
import torch

import effattn
from effattn.lowering import forms
from effattn.lowering.device import DEVICE_TYPES
from effattn.lowering.forms.form import Form
from effattn.passes.graph import vocabulary
from effattn.passes.symbolic import reader

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n# (\S+?\.py)(?:, (\w+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
N = 40


def blocks(heading: str) -> list[tuple[str, str, str]]:
    """(file, table in it, code) of each block below a heading."""
    (section,) = re.findall(rf"^### {heading}\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    return BLOCK.findall(section)


@pytest.fixture
def added(monkeypatch, tmp_path):
    """Does what a walk says, for one test."""
    monkeypatch.setattr(reader, "HANDLERS", dict(reader.HANDLERS))

    def add(heading: str) -> None:
        new: dict = {}
        for file, table, code in blocks(heading):
            if file == "effattn/passes/graph/vocabulary.py":
                for name, spellings in eval(f"({code})", vars(vocabulary)):
                    for spelling in spellings:
                        monkeypatch.setitem(vocabulary._BY_TARGET, spelling.target, (name, spelling))
            elif table:
                name = file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
                module = importlib.import_module(name)
                if isinstance(rows := getattr(module, table), dict):
                    for name, value in eval(f"{{{code}}}", {**vars(module), **new}).items():
                        monkeypatch.setitem(rows, name, value)
                else:
                    monkeypatch.setattr(module, table, (*rows, *eval(f"({code})", new)))
            elif (ROOT / file).exists():
                module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
                new |= {**vars(module)}
                exec(compile(code, file, "exec"), new)
            else:
                path = tmp_path / pathlib.Path(file).name
                path.write_text(code, encoding="utf-8")
                spec = importlib.util.spec_from_file_location(path.stem, path)
                module = importlib.util.module_from_spec(spec)
                monkeypatch.setitem(sys.modules, path.stem, module)
                spec.loader.exec_module(module)
                new[path.stem] = module
                new[path.stem.upper()] = row = vars(module).get(path.stem.upper())
                if isinstance(row, Form):
                    monkeypatch.setitem(forms.FORMS, row.name, row)

    return add


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, N, 16, generator=generator) for _ in range(3)]


def masked(mask):
    def function(q, k, v):
        return (q @ k.mT).masked_fill(~mask(), -torch.inf).softmax(-1) @ v

    return function


def near():
    i = torch.arange(N)
    return torch.absolute(i - i[:, None]) < 4


def signs():
    i = torch.arange(N)
    return torch.sgn(i[:, None] - i) >= 0


def band():
    i = torch.arange(N)
    return (i <= i[:, None]) & (i[:, None] - i < 4)


def predicates(function, **options):
    torch._dynamo.reset()
    with torch.no_grad():
        return [site.predicate for site in effattn.explain(function, *qkv(), options=options or None).sites]


def same(function, **options):
    torch._dynamo.reset()
    options = {"rest": "eager", "verify": True, "strict": True, **options}
    fast = torch.compile(function, backend="effattn", options=options)
    with torch.no_grad():
        torch.testing.assert_close(fast(*qkv()), function(*qkv()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("heading", "mask", "predicate"),
    [("Your first spelling", near, "q - k < 4 & k <= 3 + q"), ("Your first mask operation", signs, "k <= q")],
    ids=["spelling", "mask operation"],
)
def test_what_is_read_in_a_mask(added, heading, mask, predicate):
    function = masked(mask)
    assert predicates(function) != [predicate]
    added(heading)
    assert predicates(function) == [predicate]
    same(function)


def test_a_form(added):
    with pytest.raises(effattn.errors.EffattnError, match="unknown form 'strided'"):
        effattn.attention(*qkv(), form="strided", causal=True)
    added("Your first form")
    form, i = forms.FORMS["strided"], torch.arange(N)
    params = form.params(window=4, every=8)
    kept = form.reference(params, i[:, None], i[None]) & (i <= i[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv(), attn_mask=kept)
    actual = effattn.attention(*qkv(), form="strided", causal=True, window=4, every=8)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    policy = {"rule": [{"forms": ["strided"], "params": {"strided": {"window": 4, "every": 8}}}]}
    torch._dynamo.reset()
    with torch.no_grad():
        (site,) = effattn.explain(masked(lambda: torch.ones(N, N).tril() > 0), *qkv(), policy=policy).sites
    assert (site.form, site.exact) == ("strided", False)


@pytest.fixture
def library():
    """An operator of somebody's library, for one test."""
    held = torch.library.Library("library", "DEF")
    held.define("attention(Tensor query, Tensor key, Tensor value, bool causal) -> Tensor")

    def attention(query, key, value, causal):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=None)

    held.impl("attention", attention, "CompositeExplicitAutograd")
    held._register_fake("attention", lambda query, key, value, causal: torch.empty_like(query))
    yield
    held._destroy()


def test_an_anchor(added, library):
    def function(q, k, v):
        return torch.ops.library.attention(q, k, v, True)

    assert predicates(function) == []
    added("Your first anchor")
    assert predicates(function) == ["k <= q"]
    same(function)


def test_a_target(added, monkeypatch):
    def function(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band())

    with pytest.raises(effattn.OptionError, match="target='counting'"):
        predicates(function, target="counting")
    added("Your first target")
    from effattn.runtime.targets.choice import TARGETS

    computed = TARGETS["counting"].computed
    same(function, target="counting")
    assert computed == ["exact"]
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    torch._dynamo.reset()
    fast = torch.compile(function, backend="effattn", options={"rest": "eager", "target": "counting"})
    found = torch.autograd.grad(fast(q, k, v).sum(), (q, k, v))
    torch.testing.assert_close(found, torch.autograd.grad(function(q, k, v).sum(), (q, k, v)), rtol=1e-4, atol=1e-4)
    assert computed == ["exact"] * 2
    torch.ops.effattn.linear(q, k, v, target="counting")
    # it may also be what a type of device gets that names none
    monkeypatch.setitem(DEVICE_TYPES, "cpu", replace(DEVICE_TYPES["cpu"], target="counting"))
    torch._dynamo.reset()
    with torch.no_grad():
        (site,) = effattn.explain(function, *qkv()).sites
    assert site.kernel == "counting: the portable target"
    same(function)
    assert len(computed) > 2
