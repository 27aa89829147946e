"""What a generated file says, read with ``ast``: loops, what they load and test, and how places in memory are computed.

Tests of structure ask for what numbers do not show: a tile that is visited for nothing, a mask where every key is kept,
a product that wraps around only in tensors larger than a test can hold.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

# what the number of an element is multiplied by on its way to a place in memory
SIZES = re.compile(r"\w+_stride_\w+|[qk]_len|length|width|vectors|FEATURES|WIDTH|VALUE_DIM")

LEAF = re.compile(r"rows|keys|first_row|distance|(\w+_)?ok")  # where the search for what a condition comes from ends


@dataclass(frozen=True)
class Access:
    """One ``tl.load`` or ``tl.store``: the parameter that it goes through, the names in its mask."""

    tensor: str
    mask: frozenset[str]
    call: ast.Call


class Block:
    """Statements of a kernel: its whole body, or that of a loop."""

    def __init__(self, kernel: Kernel, nodes: list[ast.stmt]):
        self.kernel = kernel
        self.nodes = nodes
        self.definitions = definitions_in(nodes)

    def leaves(self, term: ast.AST, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        """What a condition comes from: ``rows``, ``keys``, ``key_ok`` and its like, loaded tensors, parameters."""
        if _is_call(term, "load"):
            return frozenset([self.kernel.tensor(term.args[0])])
        if not isinstance(term, ast.Name):
            return frozenset().union(*(self.leaves(child, seen) for child in ast.iter_child_nodes(term)))
        if LEAF.fullmatch(term.id) or term.id in self.kernel.parameters:
            return frozenset([term.id])
        known = self.kernel.definitions.get(term.id, []) if term.id not in seen else []
        return frozenset().union(*(self.leaves(one, seen | {term.id}) for one in known))

    @property
    def loads(self) -> list[Access]:
        return self._accesses("load")

    def _accesses(self, what: str) -> list[Access]:
        found = []
        for call in calls(self.nodes, what):
            masks = [word.value for word in call.keywords if word.arg == "mask"]
            mask = self.leaves(masks[0]) or frozenset([ast.unparse(masks[0])]) if masks else frozenset()
            found.append(Access(self.kernel.tensor(call.args[0]), mask, call))
        return found

    def masks(self) -> dict[str, str]:
        """Tensor that is loaded -> the names in its mask, sorted; each tensor, or all its parts, are loaded by one."""
        found: dict[str, str] = {}
        for access in self.loads:
            mask = " ".join(sorted(access.mask))
            assert found.setdefault(access.tensor, mask) == mask, f"{access.tensor} is loaded by two masks"
        return found

    @property
    def tested(self) -> str:
        """What decides about scores or weights: the names in the conditions of ``tl.where(condition, scores, ...)``."""
        found: frozenset[str] = frozenset()
        for call in calls(self.nodes, "where"):
            if isinstance(call.args[1], ast.Name) and call.args[1].id in ("scores", "weights"):
                found |= self.leaves(call.args[0])
        return " ".join(sorted(found))


class Loop(Block):
    """A ``for`` of a kernel."""

    def __init__(self, kernel: Kernel, node: ast.For):
        super().__init__(kernel, node.body)
        self.node = node

    @property
    def bounds(self) -> str:
        return ", ".join(ast.unparse(argument) for argument in self.node.iter.args)  # type: ignore[attr-defined]

    def unchanging(self, access: Access) -> bool:
        """Whether every turn reads the same place."""
        counter = {node.id for node in ast.walk(self.node.target) if isinstance(node, ast.Name)}
        changing = counter | {name for name, terms in self.definitions.items() if any(reads(t, name) for t in terms)}
        names, known = set(), {node.id for node in ast.walk(access.call.args[0]) if isinstance(node, ast.Name)}
        while known - names:
            names |= known
            terms = [term for name in known for term in self.definitions.get(name, [])]
            known = {node.id for term in terms for node in ast.walk(term) if isinstance(node, ast.Name)}
        return not names & changing


class Kernel(Block):
    """One function of a generated file."""

    def __init__(self, source: str, name: str = "forward"):
        self.module = ast.parse(source)
        self.function = next(node for node in self.module.body if getattr(node, "name", "") == name)
        assert isinstance(self.function, ast.FunctionDef)
        arguments = self.function.args.args
        self.parameters = [argument.arg for argument in arguments if not argument.annotation]
        self.constants = [argument.arg for argument in arguments if argument.annotation]
        super().__init__(self, self.function.body)

    @property
    def loops(self) -> list[Loop]:
        nodes = [node for node in ast.walk(self.function) if isinstance(node, ast.For)]
        return [Loop(self, node) for node in sorted(nodes, key=lambda node: node.lineno)]

    @property
    def unspecialised(self) -> list[str]:
        """The numbers whose divisibility by 16 is not compiled in."""
        (decorator,) = self.function.decorator_list
        assert isinstance(decorator, ast.Call)
        return ast.literal_eval(decorator.keywords[0].value)

    def setting(self, name: str):
        """A constant of the file: ``CONSTANTS``, ``OPTIONS``."""
        nodes = [node for node in self.module.body if isinstance(node, ast.Assign)]
        return ast.literal_eval(next(node.value for node in nodes if node.targets[0].id == name))  # type: ignore[attr-defined]

    def tensor(self, address: ast.expr) -> str:
        """The parameter that an address begins at: the first of what is added up."""
        line = address.lineno
        while not isinstance(address, ast.Name) or address.id not in self.parameters:
            if isinstance(address, ast.BinOp):
                address = address.left
            else:
                assert isinstance(address, ast.Name), ast.unparse(address)
                address = max((one for one in self.definitions[address.id] if one.lineno < line), key=_line)
                line = address.lineno
        return address.id

    # -- arithmetic of places -----------------------------------------------------------------------------------------

    def narrow_products(self) -> list[str]:
        """Products on the way to an address that may pass 2**31 and are not computed in 64 bits."""
        found, seen = [], set()
        waiting: list[ast.AST] = [access.call.args[0] for what in ("load", "store") for access in self._accesses(what)]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.Name) and node.id not in seen:
                seen.add(node.id)
                waiting += self.definitions.get(node.id, [])
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                for size, other in ((node.left, node.right), (node.right, node.left)):
                    if is_size(size) and self.grows(other) and not self.is_wide(other):
                        found.append(ast.unparse(node))
            waiting += ast.iter_child_nodes(node)
        return found

    def grows(self, term: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a value grows with the call: not a constant, nor an index within a tile."""
        if isinstance(term, ast.Constant) or _is_call(term, "arange"):
            return False
        if isinstance(term, ast.Name):
            if term.id in seen or term.id in self.constants:
                return False
            known = self.definitions.get(term.id)
            return True if known is None else any(self.grows(one, seen | {term.id}) for one in known)
        if isinstance(term, ast.BinOp):
            return (not isinstance(term.op, ast.Mod) and self.grows(term.left, seen)) or self.grows(term.right, seen)
        if isinstance(term, ast.UnaryOp):
            return self.grows(term.operand, seen)
        if isinstance(term, ast.Subscript):
            return self.grows(term.value, seen)
        return True

    def is_wide(self, term: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a value is of 64 bits."""
        if isinstance(term, ast.Name):
            known = self.definitions.get(term.id, [])
            return term.id in seen or (bool(known) and all(self.is_wide(one, seen | {term.id}) for one in known))
        if isinstance(term, ast.BinOp):
            return self.is_wide(term.left, seen) or self.is_wide(term.right, seen)
        if isinstance(term, (ast.UnaryOp, ast.Subscript)):
            return self.is_wide(term.operand if isinstance(term, ast.UnaryOp) else term.value, seen)
        return isinstance(term, ast.Call) and ast.unparse(term).endswith(".to(tl.int64)")

    # -- loads that are not needed ------------------------------------------------------------------------------------

    def needless_loads(self) -> list[str]:
        """Loads of one place in every turn of a loop, the same load twice, and loads that nothing reads."""
        found = [
            f"in every turn: {ast.unparse(access.call)}"
            for loop in self.loops
            for access in loop.loads
            if loop.unchanging(access)
        ]
        of_loops = ([node for node in loop.nodes if not isinstance(node, ast.For)] for loop in self.loops)
        for block in (self.own_statements(), *of_loops):
            texts = [ast.unparse(call) for call in calls(block, "load")]
            found += [f"twice: {text}" for text in set(texts) if texts.count(text) > 1]
        read = {node.id for node in ast.walk(self.function) if _is_read(node)}
        for node in ast.walk(self.function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and calls([node], "load"):
                found += [] if node.targets[0].id in read else [f"never read: {ast.unparse(node)}"]
        return found

    def own_statements(self) -> list[ast.stmt]:
        return [node for node in self.nodes if not isinstance(node, (ast.For, ast.If))]


def definitions_in(nodes: list[ast.stmt]) -> dict[str, list[ast.expr]]:
    """Name -> everything that is assigned to it; ``x += y`` assigns ``x + y``, a loop its counter."""
    found: dict[str, list[ast.expr]] = {}
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.AugAssign):
            old = ast.Name(node.target.id, ast.Load())  # type: ignore[union-attr]
            found.setdefault(old.id, []).append(ast.copy_location(ast.BinOp(old, node.op, node.value), node))
        elif isinstance(node, ast.For):
            found.setdefault(node.target.id, []).append(node.iter)  # type: ignore[attr-defined]
        elif isinstance(node, ast.Assign):
            (target,) = node.targets
            if isinstance(target, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=True):  # type: ignore[attr-defined]
                    found.setdefault(one.id, []).append(value)  # type: ignore[attr-defined]
            else:
                found.setdefault(target.id, []).append(node.value)  # type: ignore[attr-defined]
    return found


def calls(nodes: list[ast.stmt], name: str) -> list[ast.Call]:
    """The calls of ``tl.name`` in some statements."""
    return [inner for node in nodes for inner in ast.walk(node) if _is_call(inner, name)]


def is_size(term: ast.AST) -> bool:
    if isinstance(term, ast.BinOp) and isinstance(term.op, ast.Mult):
        return is_size(term.left) and is_size(term.right)
    return isinstance(term, ast.Name) and SIZES.fullmatch(term.id) is not None


def reads(term: ast.AST, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(term))


def _line(node: ast.expr) -> int:
    return node.lineno


def _is_call(node: ast.AST, name: str) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr == name and isinstance(node.func.value, ast.Name) and node.func.value.id == "tl"


def _is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
