"""The rooms of the package: imports run downwards, from floor to floor, and folders stay small enough to look over."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import effattn

ROOT = Path(effattn.__file__).parent
# from the roof down: what stands earlier may import what stands later; what is not listed may be imported by all
ROOMS = (
    "cli",
    "bench",
    "evaluate",
    "functional",
    "models",
    "compiler",
    "passes",
    "policy",
    "runtime",
    "lowering",
    "ir",
)
FLOORS = {
    "passes": (
        *("rewrite", "choose", "canonicalize", "match", "diagnose", "assemble", "candidate", "masks", "symbolic"),
        "graph",
    ),
    "runtime": ("ops", "targets", "selection", "reference"),
    "lowering": ("forms", "schedules", "kernels", "dialects", "iteration"),
}
MOST_FILES = 15


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of ours that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("effattn."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "effattn":
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def upwards(floors: tuple[str, ...], here: str, there: str) -> bool:
    return here in floors and there in floors and floors.index(there) < floors.index(here)


def test_imports_run_downwards():
    wrong = []
    for path in files():
        here = path.relative_to(ROOT).with_suffix("").parts
        for line, name in imports(path):
            there = name.split(".")[1:]
            up = upwards(ROOMS, here[0], there[0])
            if here[0] == there[0] and len(here) > 2 and len(there) > 1:
                up = up or upwards(FLOORS.get(here[0], ()), here[1], there[1])
            if up:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_rooms_are_all_there_are():
    """A folder that is on no list would be checked by nobody."""
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} <= set(ROOMS)
    for room, floors in FLOORS.items():
        assert {path.name for path in (ROOT / room).iterdir() if (path / "__init__.py").exists()} == set(floors)


def test_no_import_cycles():
    names = {".".join(("effattn", *path.relative_to(ROOT).with_suffix("").parts)): path for path in files()}
    graph = nx.DiGraph()
    for name, path in names.items():
        for node in ast.parse(
            path.read_text()
        ).body:  # at the top: an import inside a function waits until it is called
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("effattn."):
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    graph.add_edge(name, module if module in names else node.module)
    cycles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert not cycles


@pytest.mark.parametrize(
    "where", [ROOT, *sorted({path.parent for path in files()} - {ROOT})], ids=lambda where: where.name
)
def test_folders_can_be_looked_over(where):
    held = [path for path in where.iterdir() if path.is_file() and path.name != "__init__.py"]
    assert len(held) <= MOST_FILES, Counter(path.suffix for path in held)
