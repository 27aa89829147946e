"""One vocabulary for all spellings: ``torch.add(x, y)``, ``x + y`` and ``x.add(y)`` are the same call.

``ROWS`` is the whole table. A new spelling is an entry in a row. A new operation is a row, plus a reader in
:mod:`effattn.passes.symbolic` if masks or scores may contain it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from effattn.versions import ATTRIBUTES


@dataclass(frozen=True)
class Spelling:
    """One way to write an operation: a function object or a method name, with its parameter names in order.

    ``says``: arguments that the target implies.
    """

    target: Callable | str
    params: tuple[str, ...]
    says: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Call:
    """A graph node in the vocabulary's terms. ``args`` maps parameter names to the arguments that were passed."""

    name: str
    node: fx.Node
    args: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        return self.args.get(name, default)

    @property
    def casts(self) -> bool:
        """Whether the call converts its input to another dtype (or device)."""
        return self.name in ("to", "type_as") or self.name.startswith("cast_")


def _row(name: str, params: str, functions: tuple = (), methods: str = "", also: tuple = ()) -> tuple:
    """A row: canonical name, and functions and methods with these parameters; ``also`` lists (target, params)."""
    names = tuple(params.split())
    spellings = [Spelling(function, names) for function in functions]
    spellings += [Spelling(method, names) for method in methods.split()]
    spellings += [Spelling(target, tuple(other.split())) for target, other in also]
    return name, tuple(spellings)


def _starred(name: str, star: str, methods: str, functions: tuple = ()) -> tuple:
    """A row whose methods accept both ``x.view(2, 3)`` and ``x.view((2, 3))``."""
    return _row(name, f"input *{star}", functions, methods)


def _attributes() -> Iterator[Spelling]:
    """Operators that stand for an attribute such as ``x.mT``, whose name they imply."""
    for operation, name in ATTRIBUTES.items():
        yield Spelling(operation, ("input",), (("name", name),))


# rows of -inf alone give 0
SAFE_SOFTMAX = (torch._safe_softmax, torch.ops.aten._safe_softmax, torch.ops.aten._safe_softmax.default)

ROWS: tuple[tuple[str, tuple[Spelling, ...]], ...] = (
    # arithmetic
    _row("add", "input other alpha", (operator.add, torch.add, operator.iadd), "add add_ __add__ __radd__ __iadd__"),
    _row(
        "sub",
        "input other alpha",
        (operator.sub, torch.sub, torch.subtract, operator.isub),
        "sub sub_ subtract __sub__ __isub__",
    ),
    _row("rsub", "input other alpha", (torch.rsub,), "rsub __rsub__"),
    _row(
        "mul",
        "input other",
        (operator.mul, torch.mul, torch.multiply, operator.imul),
        "mul mul_ multiply __mul__ __rmul__ __imul__",
    ),
    _row(
        "div",
        "input other rounding_mode",
        (operator.truediv, torch.div, torch.true_divide, operator.itruediv),
        "div div_ true_divide divide __truediv__ __itruediv__",
        (("__rtruediv__", "other input"),),
    ),
    _row(
        "pow",
        "input exponent",
        (operator.pow, torch.pow),
        "pow __pow__",
        (("__rpow__", "exponent input"),),
    ),
    _row("floordiv", "input other", (operator.floordiv, torch.floor_divide), "floor_divide __floordiv__"),
    _row("mod", "input other", (operator.mod, torch.remainder), "remainder __mod__"),
    _row("neg", "input", (operator.neg, torch.neg, torch.negative), "neg negative __neg__"),
    _row("abs", "input", (operator.abs, torch.abs), "abs __abs__"),
    _row("tanh", "input", (torch.tanh, F.tanh), "tanh tanh_"),
    _row("sigmoid", "input", (torch.sigmoid, F.sigmoid), "sigmoid"),
    _row("relu", "input inplace", (F.relu,), "relu", ((torch.relu, "input"),)),
    *(
        _row(name, "input", (getattr(torch, name),), name)
        for name in (
            *("exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos", "sign", "square", "reciprocal"),
        )
    ),
    _row("lshift", "input other", (operator.lshift, torch.bitwise_left_shift), "bitwise_left_shift __lshift__"),
    _row("rshift", "input other", (operator.rshift, torch.bitwise_right_shift), "bitwise_right_shift __rshift__"),
    _row("dot", "input other", (torch.dot,), "dot"),
    _row("minimum", "input other", (torch.minimum,), "minimum"),
    _row("maximum", "input other", (torch.maximum,), "maximum"),
    _row("max", "input other keepdim", (torch.max,), "max"),
    _row("amax", "input dim keepdim", (torch.amax,), "amax"),
    _row("min", "input other keepdim", (torch.min,), "min"),
    _row("logsumexp", "input dim keepdim", (torch.logsumexp,), "logsumexp"),
    _row("clamp", "input min max", (torch.clamp, torch.clip), "clamp clip clamp_"),
    # comparison and logic
    *(
        _row(
            name, "input other", (getattr(operator, name), getattr(torch, name), *aliases), f"{name} __{name}__ {more}"
        )
        for name, aliases, more in (
            ("le", (torch.less_equal,), "less_equal"),
            ("lt", (torch.less,), "less"),
            ("ge", (torch.greater_equal,), "greater_equal"),
            ("gt", (torch.greater,), "greater"),
            ("eq", (), ""),
            ("ne", (torch.not_equal,), "not_equal"),
        )
    ),
    _row(
        "and",
        "input other",
        (operator.and_, torch.logical_and, torch.bitwise_and, operator.iand),
        "logical_and bitwise_and logical_and_ bitwise_and_ __and__ __rand__ __iand__",
    ),
    _row(
        "or",
        "input other",
        (operator.or_, torch.logical_or, torch.bitwise_or, operator.ior),
        "logical_or bitwise_or __or__ __ror__",
    ),
    _row("xor", "input other", (operator.xor, torch.logical_xor, torch.bitwise_xor), "logical_xor bitwise_xor __xor__"),
    _row("not", "input", (operator.invert, torch.logical_not, torch.bitwise_not), "logical_not bitwise_not __invert__"),
    _row("where", "condition input other", (torch.where,), "", (("where", "input condition other"),)),
    _row("masked_fill", "input mask value", (torch.masked_fill,), "masked_fill masked_fill_"),
    _row("fill", "input value", (torch.fill,), "fill fill_"),
    _row("zero", "input", (), "zero_"),
    # casts and copies
    _row("to", "input *to", (), "to type"),
    _row("type_as", "input other", (), "type_as"),
    *(
        _row(f"cast_{dtype}", "input", (), method)
        for method, dtype in (
            ("float", "float32"),
            ("double", "float64"),
            ("half", "float16"),
            ("bfloat16", "bfloat16"),
            ("int", "int32"),
            ("long", "int64"),
            ("bool", "bool"),
        )
    ),
    _row("identity", "input", (torch.clone, torch.detach), "contiguous clone detach requires_grad_"),
    _row(
        "dropout",
        "input p training inplace",
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        "",
        ((torch.dropout, "input p training"),),
    ),
    # views
    _starred("reshape", "shape", "view reshape", (torch.reshape,)),
    _row(
        "reshape",
        "input",
        (torch.flatten, torch.unflatten, torch.unsqueeze, torch.squeeze, torch.ravel),
        "flatten unflatten unsqueeze squeeze view_as reshape_as ravel",
    ),
    _row(
        "transpose", "input dim0 dim1", (torch.transpose, torch.swapaxes, torch.swapdims), "transpose swapaxes swapdims"
    ),
    _row("permute", "input *dims", (torch.permute,), "permute"),
    _row("movedim", "input source destination", (torch.movedim, torch.moveaxis), "movedim moveaxis"),
    _row("t", "input", (torch.t, torch.adjoint), "t adjoint"),
    ("getattr", (Spelling(getattr, ("input", "name")), *_attributes())),
    _starred("expand", "sizes", "expand", ()),
    _row("expand", "input sizes", (torch.broadcast_to,), "expand_as broadcast_to"),
    _row("getitem", "input index", (operator.getitem,), "__getitem__"),
    _row("setitem", "input index value", (operator.setitem,), "__setitem__"),
    _row("gather", "input dim index", (torch.gather,), "gather"),
    _row("select", "input dim index", (torch.select,), "select"),
    _row("narrow", "input dim start length", (torch.narrow,), "narrow"),
    _row("chunk", "input chunks dim", (torch.chunk,), "chunk"),
    _row("split", "input split_size dim", (torch.split,), "split"),
    _row("unbind", "input dim", (torch.unbind,), "unbind"),
    _starred("repeat", "repeats", "repeat", ()),
    _row("repeat_interleave", "input repeats dim output_size", (torch.repeat_interleave,), "repeat_interleave"),
    _row("cat", "tensors dim", (torch.cat, torch.concat, torch.concatenate)),
    _row("hstack", "tensors", (torch.hstack,)),
    _row("pad", "input pad mode value", (F.pad, torch._C._nn.pad)),
    _row("flip", "input *dims", (torch.flip,), "flip"),
    # factories
    _row("arange", "*bounds", (torch.arange,)),
    _row("ones", "*size", (torch.ones,)),
    _row("ones", "input", (torch.ones_like,), "new_ones"),
    _row("zeros", "*size", (torch.zeros,)),
    _row("zeros", "input", (torch.zeros_like,), "new_zeros"),
    _row("full", "size fill_value", (torch.full,), "", (("new_full", "input size fill_value"),)),
    _row("full", "input fill_value", (torch.full_like,)),
    _row("tensor", "data", (torch.tensor, torch.scalar_tensor, torch.as_tensor), "", (("new_tensor", "input data"),)),
    # mask structure
    _row("tril", "input diagonal", (torch.tril,), "tril tril_"),
    _row("triu", "input diagonal", (torch.triu,), "triu triu_"),
    _row("cumsum", "input dim", (torch.cumsum,), "cumsum"),
    _row("sum", "input dim keepdim dtype", (torch.sum,), "sum"),
    _row("diff", "input n dim prepend append", (torch.diff,), "diff"),
    # applied to weights of queries that may be NaN
    _row("nan_to_num", "input nan posinf neginf", (torch.nan_to_num,), "nan_to_num"),
    _row("isnan", "input", (torch.isnan,), "isnan"),
    # contractions and softmax
    _row("matmul", "input other", (operator.matmul, torch.matmul, torch.bmm, torch.mm), "matmul bmm mm __matmul__"),
    _row("baddbmm", "input batch1 batch2 beta alpha", (torch.baddbmm,), "baddbmm"),
    _row("einsum", "equation *operands", (torch.einsum, torch.functional.einsum)),
    (
        "softmax",
        (
            *_row("softmax", "input dim dtype", (torch.softmax, torch.special.softmax), "softmax")[1],
            Spelling(F.softmax, ("input", "dim", "_stacklevel", "dtype")),
            *(Spelling(function, ("input", "dim", "dtype"), (("safe", True),)) for function in SAFE_SOFTMAX),
        ),
    ),
    _row(
        "log_softmax",
        "input dim dtype",
        (torch.log_softmax, torch.special.log_softmax),
        "log_softmax",
        ((F.log_softmax, "input dim _stacklevel dtype"),),
    ),
    _row(
        "sdpa",
        "query key value attn_mask dropout_p is_causal scale enable_gqa",
        (F.scaled_dot_product_attention,),
    ),
    _row(
        "flex_attention",
        "query key value score_mod block_mask scale kernel_options score_mod_other_buffers mask_mod_other_buffers",
        (torch.ops.higher_order.flex_attention,),
    ),
)

_BY_TARGET: dict[Any, tuple[str, Spelling]] = {
    spelling.target: (name, spelling) for name, spellings in ROWS for spelling in spellings
}


def named(target: Any) -> str | None:
    """The canonical name of ``target``, a function or a method's name; None if the vocabulary does not have it."""
    entry = _BY_TARGET.get(target)
    return None if entry is None else entry[0]


def canonical(node: fx.Node) -> Call | None:
    """``node`` as a call of the vocabulary, or None if the vocabulary does not contain its target."""
    if node.op not in ("call_function", "call_method"):
        return None
    entry = _BY_TARGET.get(node.target)
    if entry is None:
        return None
    name, spelling = entry
    params, positional = spelling.params, node.args
    args: dict[str, Any] = dict(zip(params, positional, strict=False))
    if params[-1].startswith("*"):
        rest = positional[len(params) - 1 :]
        args.pop(params[-1], None)
        args[params[-1][1:]] = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    else:
        for extra, value in enumerate(positional[len(params) :]):
            args[f"_{extra}"] = value  # arguments already reflected in the result's shape and dtype
    args.update(spelling.says)
    args.update(node.kwargs)
    return Call(name, node, args)


def drops_elements(call: Call) -> bool:
    """Whether a dropout drops each element on its own, and not whole channels, and leaves zeros."""
    return call.name == "dropout" and call.node.target in (F.dropout, torch.dropout)


def is_dead_dropout(call: Call) -> bool:
    """Whether a dropout has no effect: p is 0, or it is not in training mode."""
    if call.name != "dropout":
        return False
    return call.get("p", 0.5) == 0 or call.get("training", True) is False


def one_dim(dim: Any, rank: int) -> int | None:
    """The one dimension that a reduction names, as a nonnegative index; None if it names none or several."""
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return dims[0] % rank if len(dims) == 1 and isinstance(dims[0], int) else None
