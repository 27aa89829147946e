"""Products of two tensors that sum over one or more indices: matmul, bmm, baddbmm, einsum.

A contraction is described like an einsum: one label per dimension of each operand and of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call

CONTRACTIONS = ("matmul", "baddbmm", "einsum")


@dataclass(frozen=True)
class Contraction:
    """``out[out_labels] = sum over the shared labels ``sums`` of left[left_labels] * right[right_labels]``."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    out_labels: tuple[str, ...]

    @property
    def sums(self) -> tuple[str, ...]:
        """The labels that are summed over, at least one, in the order of ``left_labels``."""
        return tuple(x for x in self.left_labels if x in self.right_labels and x not in self.out_labels)

    @property
    def summed(self) -> str | None:
        """The label that is summed over; None if there are several."""
        return self.sums[0] if len(self.sums) == 1 else None

    def keeps_rows(self, side: str) -> bool:
        """Whether the operand's last dimension is summed and its others lead the result in the same order."""
        labels = self.operand(side)[1]
        return labels[-1] == self.summed and self.out_labels[:-1] == labels[:-1]

    def operand(self, side: str) -> tuple[fx.Node, tuple[str, ...]]:
        return (self.left, self.left_labels) if side == "left" else (self.right, self.right_labels)


def contraction(view: GraphView, node: Any) -> Contraction | None:
    """``node`` as a contraction; None if it is not one."""
    call = view.call(node)
    if call is None:
        return None
    if call.name in ("matmul", "baddbmm"):
        names = ("input", "other") if call.name == "matmul" else ("batch1", "batch2")
        other = call.get(names[1], call.get("mat2"))
        return _product(view, call.node, call.get(names[0]), other)
    if call.name == "einsum":
        return _einsum(view, call)
    return None


def _product(view: GraphView, node: fx.Node, left: Any, right: Any) -> Contraction | None:
    shapes = [view.shape(operand) if isinstance(operand, fx.Node) else () for operand in (left, right)]
    if min(len(shape) for shape in shapes) < 2:
        return None
    rank = max(len(shape) for shape in shapes)
    batch = [f"b{n}" for n in range(rank - 2)]
    labels = [tuple(batch[len(batch) - (len(shape) - 2) :]) for shape in shapes]
    return Contraction(node, left, right, (*labels[0], "i", "sum"), (*labels[1], "sum", "j"), (*batch, "i", "j"))


def _einsum(view: GraphView, call: Call) -> Contraction | None:
    equation, operands = call.get("equation"), call.get("operands", ())
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:  # implicit output: labels that occur once, in alphabetical order
        output = ("..." if "..." in inputs else "") + "".join(
            letter for letter in sorted(set(inputs) - {",", "."}) if inputs.count(letter) == 1
        )
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    ranks = [len(view.shape(operand)) for operand in operands]
    left, right = (_labels(term, rank) for term, rank in zip(terms, ranks, strict=True))
    out = _labels(output, len(view.shape(call.node)))
    if left is None or right is None or out is None:
        return None
    if any(len(set(labels)) < len(labels) for labels in (left, right, out)):
        return None  # a diagonal
    found = Contraction(call.node, operands[0], operands[1], tuple(left), tuple(right), tuple(out))
    one, other = (view.shape(part) for part in operands)
    if not found.sums or any(one[left.index(label)] != other[right.index(label)] for label in found.sums):
        return None
    alone = set(left).symmetric_difference(right) - set(out)  # labels summed over in one operand only
    return None if alone else found


def _labels(term: str, rank: int) -> list[str] | None:
    if "..." not in term:
        return list(term) if len(term) == rank else None
    before, after = term.split("...")
    hidden = rank - len(before) - len(after)
    return [*before, *[f"b{n}" for n in range(-hidden, 0)], *after] if hidden >= 0 else None
