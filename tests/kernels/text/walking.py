"""Which tiles a generated kernel visits: the scalar code before and in its loops, run by Python, without any tensor."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np
import sympy
import torch
from plans import Call, Sizes
from reading import Kernel, definitions_in

from effattn.lowering.iteration.tile_ranges import key_conditions, tile_ranges
from effattn.lowering.kernels.parameters import kernel_constants
from effattn.lowering.kernels.spec import KernelSpec
from effattn.runtime.algebra import evaluate


class Pointer:
    """A tensor that scalar code reads from."""

    def __init__(self, tensor: np.ndarray, place: Any = 0):
        self.tensor, self.place = tensor, place

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.place + offset)


def language(program: int, programs: int) -> SimpleNamespace:
    """What scalar code uses of ``triton.language``."""
    return SimpleNamespace(
        program_id=lambda axis: program,
        num_programs=lambda axis: programs,
        load=lambda pointer: pointer.tensor[pointer.place],
        cdiv=lambda x, y: divided(x + y - 1, y),
        minimum=np.minimum,
        maximum=np.maximum,
        where=np.where,
        arange=np.arange,
        min=np.min,
        max=np.max,
        sum=np.sum,
        range=range,
    )


def divided(x: Any, y: Any) -> Any:
    """A quotient as GPUs round it: towards zero."""
    return np.sign(x) * (abs(x) // y)


def remainder(x: Any, y: Any) -> Any:
    return x - divided(x, y) * y


class _Plain(ast.NodeTransformer):
    """Leaves out types, and divides as GPUs do."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr == "to" else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        name = {ast.FloorDiv: "divided", ast.Mod: "remainder"}.get(type(node.op))
        return ast.Call(ast.Name(name, ast.Load()), [node.left, node.right], []) if name else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list = []
        for argument in node.args.args:
            argument.annotation = None
        return node


class ScalarCode:
    """The scalar code of a kernel that some names come from: before the loops, and in each of them."""

    def __init__(self, kernel: Kernel, before: tuple[str, ...], inside: str = ""):
        self.before = before
        body = kernel.function.body
        self.helpers = _compiled([node for node in kernel.module.body if getattr(node, "name", "").startswith("_")])
        self.whole = _compiled(needed(body, before))
        self.loops = []
        for place, loop in enumerate(body):
            if isinstance(loop, ast.For) and inside:
                turn = needed(loop.body, [inside])
                first = needed(body[:place], read_by([*turn, loop.iter]))
                note = ast.parse(f"noted.append({inside})").body
                self.loops.append(_compiled([*first, ast.For(loop.target, loop.iter, [*turn, *note], [])]))

    def run(self, program: int, programs: int, given: dict[str, Any]) -> tuple[list[Any], list[list[Any]]]:
        """The names before the loops, and what the one inside is in each turn of each loop.

        ``given`` are the parameters that the scalar code reads, constants too; a tensor is a numpy array.
        """
        scope = {name: Pointer(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
        scope |= {"tl": language(program, programs), "divided": divided, "remainder": remainder}
        exec(self.helpers, scope)
        found = []
        for code in (self.whole, *self.loops):
            found.append(scope | {"noted": []})
            exec(code, found[-1])
        return [found[0][name] for name in self.before], [one["noted"] for one in found[1:]]


def needed(nodes: list[ast.stmt], wanted: Iterable[str]) -> list[ast.stmt]:
    """The assignments, of those in ``nodes``, that some names come from."""
    names, found = set(wanted), []
    for node in reversed(nodes):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.While)) and names & set(definitions_in([node])):
            names |= read_by([node])
            found.append(node)
    return found[::-1]


def read_by(nodes: Iterable[ast.AST]) -> set[str]:
    return {inner.id for node in nodes for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _compiled(nodes: list[ast.stmt]) -> CodeType:
    whole = ast.fix_missing_locations(ast.Module(nodes, []))
    plain = _Plain().visit(ast.parse(ast.unparse(whole)))  # a copy: the kernel's own nodes stay as they are
    return compile(ast.fix_missing_locations(plain), "scalar code", "exec")


# -- which tiles should be visited ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visits:
    """Of one batch row and the query rows (or keys) of one program: for each tile of keys (or of query rows) how often
    a loop that tests positions visits it, and one that does not; whether it holds some kept pair, and nothing else.
    """

    tested: np.ndarray
    whole: np.ndarray
    some_kept: np.ndarray
    all_kept: np.ndarray

    @property
    def wrong(self) -> int:
        """Tiles that are visited twice or left out, and such that should be tested and are not."""
        visited = self.tested + self.whole
        return int(((visited > 1) | (self.some_kept & (visited == 0)) | (~self.all_kept & (self.whole > 0))).sum())

    @property
    def vain(self) -> int:
        """Tiles that are visited and hold nothing that is kept."""
        return int((~self.some_kept & (self.tested + self.whole > 0)).sum())

    @property
    def tested_in_vain(self) -> int:
        """Tiles in which everything is kept, and which are tested."""
        return int((self.all_kept & (self.tested > 0)).sum())


def visits(source: str, spec: KernelSpec, call: Call, sizes: Sizes, kernel: str, splits: int = 3) -> list[Visits]:
    """What every program of a kernel in ``source`` visits, of one head; programs that share rows are added up."""
    by_keys = kernel == "grad_key_value"  # a program has a tile of keys, and rows stream past
    kept, allowed = _kept(spec, call, sizes)
    kept = kept.swapaxes(1, 2) if by_keys else kept
    tiles = -(-kept.shape[2] // spec.tiles.block_n)
    given = {"q_len": sizes.q_len, "k_len": sizes.k_len, "heads": 1, "together": 1, "splits": splits}
    given |= kernel_constants(spec) | ({} if allowed is None else {"allowed": allowed}) | _data(call)
    written = Kernel(source, kernel)
    programs = splits
    if spec.kind != "decode":
        ((programs,), _) = ScalarCode(written, ("tiles",)).run(0, 1, given)
    names = ("first_key", "last_key") if by_keys else ("first_row", "last_row")
    code = ScalarCode(written, ("batch", *names), "start")
    counts: dict[tuple, np.ndarray] = {}
    for number in range(programs * sizes.batch):
        (batch, first, last), loops = code.run(number, programs * sizes.batch, given)
        if first <= last:
            here = counts.setdefault((batch, first, last), np.zeros((2, tiles), dtype=int))
            for place, starts in enumerate(loops):
                np.add.at(here[int(place < len(loops) - 1)], np.array(starts, dtype=int) // spec.tiles.block_n, 1)
    assert sum(last + 1 - first for _, first, last in counts) == sizes.batch * kept.shape[1]
    found = []
    for (batch, first, last), (tested, whole) in counts.items():
        rows = np.pad(kept[batch, first : last + 1], ((0, 0), (0, tiles * spec.tiles.block_n - kept.shape[2])))
        parts = rows.reshape(len(rows), tiles, spec.tiles.block_n)
        found.append(Visits(tested, whole, (parts > 0).any((0, 2)), (parts == 2).all((0, 2))))
    return found


def _data(call: Call) -> dict[str, Any]:
    """Parameters for what the predicate reads."""
    found: dict[str, Any] = {}
    for capture, tensor in zip(call.plan.spec.captures, call.captures, strict=True):
        found[f"data_{capture.name}"] = tensor.contiguous().numpy().reshape(-1)
        found |= {f"{capture.name}_stride_{dim}": step for dim, step in enumerate(tensor.contiguous().stride())}
    return found | {f"scalar_{name}": value for name, value in zip(call.plan.spec.scalars, call.scalars, strict=True)}


def _kept(spec: KernelSpec, call: Call, sizes: Sizes) -> tuple[np.ndarray, np.ndarray | None]:
    """int [B, Nq, Nk] 0: not to be visited; 1: kept, and to be tested; 2: kept by positions alone.

    And what ``find_allowed`` writes, if keys that data allows are found first.
    """
    rule = tile_ranges(spec.attention.rule)
    kept = 2 * _grid(rule.structural, call, sizes).astype(int)
    condition = key_conditions(rule.residual)[0]
    if condition == sympy.true:
        return kept, None
    allowed = np.zeros((sizes.batch, 2, 32), dtype=int)
    allowed[:, 0] = sizes.k_len
    for batch, seen in enumerate(_grid(condition, call, sizes)[:, 0]):
        places = np.flatnonzero(seen)
        first, end = (places[0], places[-1] + 1) if len(places) else (sizes.k_len, 0)
        allowed[batch, :, 5] = first, end
        kept[batch, :, :first], kept[batch, :, end:] = 0, 0
        if end - first != len(places):
            kept[batch] = np.minimum(kept[batch], 1)
    return kept, allowed.reshape(-1)


def _grid(term: Any, call: Call, sizes: Sizes) -> np.ndarray:
    """A boolean term over all queries and keys, [B, Nq, Nk]."""
    index = {"b": torch.arange(sizes.batch)[:, None, None], "q": torch.arange(sizes.q_len)[:, None]}
    symbols = {**index, "k": torch.arange(sizes.k_len), "h": 0, "Nq": sizes.q_len, "Nk": sizes.k_len}
    symbols |= dict(zip(call.plan.spec.scalars, call.scalars, strict=True))
    captures = {one.name: tensor for one, tensor in zip(call.plan.spec.captures, call.captures, strict=True)}
    found = torch.as_tensor(evaluate(term, symbols, captures, torch.float64, "cpu"))
    return found.expand(sizes.batch, sizes.q_len, sizes.k_len).numpy()
