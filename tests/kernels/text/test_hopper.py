"""The text of kernels in the Gluon dialect, for every kind of mask, score and data."""

from __future__ import annotations

import ast
import builtins
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
from plans import BY_HEAD, CASES, Sizes

from effattn.ir.expr import Modulo, k
from effattn.lowering.dialects.triton.module import module_from
from effattn.lowering.kernels.generate import generate
from effattn.lowering.kernels.spec import KernelSpec
from effattn.runtime.targets.triton.specialise import in_gluon

CPU = torch.device("cpu")
KINDS = ("prefill", "listed", "backward")


def spec(name: str, kind: str, groups: int = 2, dim: int = 64) -> KernelSpec | None:
    """The Gluon kernel of a case; None where there is none."""
    plan = CASES[name](Sizes(head_dim=dim, value_dim=dim), CPU).plan.complete
    base = KernelSpec(kind, plan.form, plan.spec, "bfloat16", dim, dim, groups, tiles=None)
    return in_gluon(base, "sm90", False)


def made() -> dict[str, KernelSpec]:
    found = {f"{name} {kind}": spec(name, kind) for name in CASES for kind in KINDS}
    found |= {f"{name} {kind}, D 128": spec(name, kind, dim=128) for name in CASES for kind in ("prefill", "listed")}
    found |= {f"{name} backward, a key head for each": spec(name, "backward", groups=1) for name in BY_HEAD}
    return {name: one for name, one in found.items() if one is not None}


MADE = made()


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def known(source: str) -> set[str]:
    """Names of the module."""
    found = set(dir(builtins)) | functions(source).keys()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def unknown(function: ast.FunctionDef, outside: set[str]) -> set[str]:
    """Names that a function reads before it sets them, in the order of its text."""
    seen = outside | {arg.arg for arg in function.args.args}
    missing = set()
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    places = {
        id(node): place for place, node in enumerate(sorted(names, key=lambda node: (node.lineno, node.col_offset)))
    }
    # an assignment sets its names after its value was read
    last = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inside = [each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
            last |= {id(each): node.end_lineno for each in inside}
    for node in sorted(names, key=lambda node: (last.get(id(node), node.lineno), id(node) in last, places[id(node)])):
        if isinstance(node.ctx, ast.Store):
            seen.add(node.id)
        elif node.id not in seen:
            missing.add(node.id)
    return missing


def every_round(function):
    """What a partition does for each of its blocks of queries; the backward has one for each program."""
    loops = [node for node in function.body if isinstance(node, ast.For)]
    return next((loop.body for loop in loops if ast.unparse(loop.iter) == "range(rounds)"), function.body)


def test_most_cases_have_kernels():
    assert sum(name.endswith("listed") for name in MADE) >= len(CASES) - 5
    assert sum(name.endswith("backward") for name in MADE) > len(CASES) // 3


@pytest.mark.parametrize("name", MADE)
def test_every_partition_defines_what_it_reads(name):
    source = generate(MADE[name])
    outside = known(source)
    kernels = {name: node for name, node in functions(source).items() if node.decorator_list}
    assert len(kernels) >= 3
    missing = {name: unknown(node, outside) for name, node in kernels.items()}
    assert {function: names for function, names in missing.items() if names} == {}


@pytest.mark.parametrize("name", MADE)
def test_copied_and_computed_tiles_are_the_same(name):
    """Producer and consumers find the tiles to visit by the same lines."""
    made = functions(generate(MADE[name]))
    copies, computes = ("copy_keys", "differentiate_rows") if "copy_keys" in made else ("copy_tiles", "attend_rows")
    lines = [ast.unparse(line) for line in every_round(made[copies]) if isinstance(line, ast.Assign)]
    others = {ast.unparse(line) for line in every_round(made[computes]) if isinstance(line, ast.Assign)}
    lines = [line for line in lines if not line.startswith("kv_head = ")]
    assert len(lines) > 4
    assert [line for line in lines if line not in others] == []


@pytest.mark.parametrize("name", MADE)
def test_launchers_pass_what_kernels_take(name, monkeypatch):
    one = MADE[name]
    module = module_from(generate(one), Path(f"{name}.py"))
    started = []
    monkeypatch.setattr(module, "start", lambda known, kernel, grid, *given, **options: started.append((kernel, given)))
    module.launch(**{name: given_to_launchers(one)[name] for name in inspect.signature(module.launch).parameters})
    assert len(started) == (3 if one.kind == "backward" else 2 if one.attention.empty_output == "mean" else 1)
    for kernel, given in started:
        assert len(given) == len(kernel.arg_names)


def given_to_launchers(one: KernelSpec) -> dict:
    """What the launcher of a kernel is called with: batch 1, one key head, 70 queries and keys."""
    query, key = (torch.zeros(1, heads, 70, one.head_dim, dtype=torch.bfloat16) for heads in (one.groups, 1))
    value, out = (torch.zeros(1, heads, 70, one.value_dim, dtype=torch.bfloat16) for heads in (1, one.groups))
    rows = torch.zeros(1, one.groups, 70)
    lists = [torch.zeros(1, 1, 1, 1, dtype=torch.int32), *(torch.zeros(1, 1, 1, dtype=torch.int32) for _ in range(2))]
    named = dict(zip(("kv_indices", "kv_num_blocks", "partial_blocks"), lists, strict=True))
    tensors = {"query": query, "key": key, "value": value, "out": out, "lse": rows, "log_totals": rows, "grad_out": out}
    return {
        **tensors,
        **named,
        "grad_lse": None,
        "grads": (query, key, value),
        "captures": [torch.zeros([4] * capture.ndim) for capture in one.attention.captures],
        "scalars": [1 for _ in one.attention.scalars],
        "numbers": [1.0 for _ in one.attention.numbers],
        "lists": lists,
        "transposed_lists": lists,
        "known": None,
    }


def test_a_missing_definition_is_noticed():
    source = generate(MADE["causal prefill"])
    changed = source.replace("        full_end = every_end // BLOCK_N\n", "", 1)
    assert changed != source
    assert unknown(functions(changed)["copy_tiles"], known(changed)) == {"full_end"}


def test_what_a_selector_does_not_know_is_tested_on_every_tile():
    """Its lists say what precedes the queries; other conditions hold for single keys."""
    one = replace(MADE["causal listed"], tests_data=True)
    plain = one.attention.rule
    loops = {}
    for name, rule in (("plain", plain), ("some keys", plain & sympy.Eq(Modulo(k, 7), 0))):
        spec = replace(one, attention=replace(one.attention, predicate=rule))
        consumer = functions(generate(spec))["attend_rows"]
        loops[name] = [ast.unparse(node) for node in every_round(consumer) if isinstance(node, ast.For)]
    assert len(loops["plain"]) == 1
    assert "if i < partial_visited" in loops["plain"][0]
    assert len(loops["some keys"]) == 2
    assert all("_modulo(keys, 7)" in loop and "-inf" in loop for loop in loops["some keys"])


def test_longer_calls_and_other_types_have_none():
    one = replace(MADE["causal prefill"], tiles=None)
    assert in_gluon(one, "sm90", False) is not None
    for changes in ({"dtype": "float32"}, {"head_dim": 60}, {"head_dim": 32}, {"wide": True}, {"value_dim": 512}):
        assert in_gluon(replace(one, **changes), "sm90", False) is None
    assert in_gluon(one, "sm100", False) is None
