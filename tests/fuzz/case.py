"""One case: a row of every table and sizes, and the attention function that they spell."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.fuzz.tables import data, spelling
from tests.fuzz.tables.fills import FILLS
from tests.fuzz.tables.flexible import MODS
from tests.fuzz.tables.hostile import HOSTILE
from tests.fuzz.tables.layouts import LAYOUTS, Sizes
from tests.fuzz.tables.masks import MASKS
from tests.fuzz.where import DEVICE

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
CORES = ("written", "sdpa", "flex", "hostile")
SDPA_MASKS = ("bool", "-inf", "lowest", "is_causal")
SHAPES = ("static", "marked", "automatic")  # dynamic lengths: not, from the first call on, from the second on
BATCHES = ("same", "other")  # whether the batch changes as lengths do
LONGER = (0, 4, 9)  # by how much every call's lengths, more than the first one's
UNUSED = "-"


@dataclass(frozen=True)
class Case:
    """What is not used holds "-": names of rows of the tables, so that a case can be printed and typed again."""

    core: str = "written"
    mask: str = "none"
    fill: str = UNUSED
    score: str = "plain"
    scale: str = "times a number"
    norm: str = "none"
    product: str = "@"
    scores_are: str = "as they are"
    softmax: str = "function"
    sink: str = "none"
    dropout: str = "none"
    output: str = "@"
    group: str = UNUSED
    order: str = "mask last"  # or before scale and score
    rank: str = "four"  # "three": batch and heads are one dimension at the softmax
    sdpa_mask: str = UNUSED
    mod: str = UNUSED
    blocks: str = UNUSED  # "made inside" the function that is compiled, or "given"
    hostile: str = UNUSED
    layout: str = "[B, H, N, D]"
    dtype: str = "float32"
    shapes: str = "static"
    batches: str = "same"
    grad: bool = False
    hidden: bool = False  # data hides whole rows
    batch: int = 2
    heads: int = 2
    groups: int = 1
    queries: int = 9
    keys: int = 9
    width: int = 8
    value_width: int = 8
    threads: int = 1  # that make each call at once, each with values of its own
    target: str = "portable"
    seed: int = 0

    @property
    def sizes(self) -> Sizes:
        return Sizes(*(getattr(self, field.name) for field in fields(Sizes)))

    @property
    def calls(self) -> list[Sizes]:
        """Of every call: the same twice, or other lengths, and another batch, where these are dynamic."""
        if self.shapes == "static":
            return [self.sizes] * 2
        found = []
        for number, more in enumerate(LONGER):
            lengths = (more, more) if self.queries == self.keys else (more // 2, more + number)
            batch = self.batch + number if self.batches == "other" else self.batch
            sizes = replace(self.sizes, batch=batch, queries=self.queries + lengths[0], keys=self.keys + lengths[1])
            found.append(sizes)
        return found

    @staticmethod
    def read(text: str) -> Case:
        """What :meth:`__str__` writes."""
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError(f"not Case(...): {text!r}")
        return Case(**{str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords})

    def __str__(self) -> str:
        """As Python: only what differs from the plainest case."""
        plain = Case()
        told = {name: value for name, value in asdict(self).items() if value != getattr(plain, name)}
        return f"Case({', '.join(f'{name}={value!r}' for name, value in told.items())})"

    # -- what it needs ------------------------------------------------------------------------------------------

    @property
    def data(self) -> list[str]:
        rows = {
            "written": lambda: (
                MASKS[self.mask], spelling.SCORES[self.score], spelling.SCALES[self.scale],
                spelling.PRODUCTS[self.product],
            ),
            "sdpa": lambda: (MASKS[self.mask], spelling.SCALES[self.scale]),
            "flex": lambda: (MODS[self.mod],),
            "hostile": lambda: (HOSTILE[self.hostile],),
        }[self.core]()  # fmt: skip
        names = [name for row in rows for name in row.data]
        return list(dict.fromkeys([*names, *(["sink"] if self.sink == "column" else [])]))

    @property
    def learned(self) -> set[str]:
        if self.core != "written":
            return set()
        found = {*spelling.SCORES[self.score].learned, *spelling.SCALES[self.scale].learned}
        return found | ({"sink"} if self.sink == "column" else set())

    def tensors(self, call: int = 0, thread: int = 0) -> dict[str, Tensor]:
        """The arguments of a call in a thread."""
        sizes = self.calls[call]
        seed, dtype = 100 * self.seed + 10 * thread + call, DTYPES[self.dtype]
        draw = data.Draw(sizes, dtype, seed + 1000, False)
        shapes = LAYOUTS[self.layout].shapes(sizes)
        given = {name: draw.normal(*shape).to(DEVICE) for name, shape in shapes.items()}
        return given | data.tensors(self.data, sizes, dtype, seed, self.hidden)

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the function is called with: the tensors, and a BlockMask where one is given."""
        if self.blocks != "given" or MODS[self.mod].mask(given) is None:
            return given
        q, k, _ = LAYOUTS[self.layout].open(given, self.sizes)
        return given | {"blocks": _block_mask(MODS[self.mod].mask(given), q, k)}

    def differentiable(self, given: dict[str, Tensor]) -> list[str]:
        own = set(LAYOUTS[self.layout].lengths) | {"wq", "wk", "wv"} | self.learned
        return [name for name, tensor in given.items() if name in own and tensor.is_floating_point()]

    def dynamic(self) -> dict[str, tuple[int, ...]]:
        """Name of a tensor: its dimensions that are lengths, or the batch where that changes."""
        layout = LAYOUTS[self.layout]
        found = {name: (dim,) for name, dim in layout.lengths.items()}
        found |= {name: data.LENGTHS[name] for name in self.data if name in data.LENGTHS}
        if self.batches == "other":
            batches = dict.fromkeys(layout.lengths, (layout.batch,))
            batches |= {name: (0,) for name in self.data if name in data.BATCHED}
            found |= {name: (*found.get(name, ()), *dims) for name, dims in batches.items()}
        return found

    @property
    def changes_its_mask(self) -> bool:
        """Scale or score come after the mask, so that what hides a key is a matter of numbers."""
        return self.order == "mask first" and (self.score, self.scale) != ("plain", "none")

    # -- what it means ------------------------------------------------------------------------------------------

    def allowed(self, given: dict[str, Tensor], sizes: Sizes) -> np.ndarray | None:
        """bool [B, H, Nq, Nk], without torch; None where the table does not say."""
        if self.core == "hostile" or self.changes_its_mask:
            return None
        oracle = (MODS[self.mod] if self.core == "flex" else MASKS[self.mask]).oracle
        shape = (sizes.batch, sizes.query_heads, sizes.queries, sizes.keys)
        held = {name: given[name].detach().cpu() for name in self.data}
        arrays = {name: (x.double() if x.is_floating_point() else x).numpy() for name, x in held.items()}
        grid = np.indices(shape)
        return np.broadcast_to(oracle(*grid, arrays, shape[2:]), shape).astype(bool)

    def function(self) -> Callable[[dict[str, Tensor]], Any]:
        """The attention function; its one argument is what :meth:`arguments` gives."""
        return {"written": _written, "sdpa": _sdpa, "flex": _flex, "hostile": _hostile}[self.core](self)

    def rounded(self) -> Callable[[dict[str, Tensor]], Any] | None:
        """The same function of scores that are off by the rounding of their type, some upwards and some downwards.

        None where nobody rounds scores to a type: flex_attention and SDPA compute them in float32.
        """
        return _written(self, torch.finfo(DTYPES[self.dtype]).eps) if self.core == "written" else None


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2], device=x.device)


def _signs(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=x.dtype, device=x.device).mul(2.4).cos().sign().view(x.shape)


def _written(case: Case, off_by: float = 0.0) -> Callable:
    """``off_by``: how much products of query and key are off, relative to themselves."""
    layout, sizes, groups = LAYOUTS[case.layout], case.sizes, case.groups
    norm, scale, score = spelling.NORMS[case.norm], spelling.SCALES[case.scale], spelling.SCORES[case.score]
    mask, fill = MASKS[case.mask], FILLS.get(case.fill)
    softmax, dropout = spelling.SOFTMAXES[case.softmax], spelling.DROPOUTS[case.dropout]
    cast, sink, flat = spelling.SCORES_ARE[case.scores_are], case.sink == "column", case.rank == "three"
    product, output = spelling.PRODUCTS[case.product].make, spelling.OUTPUTS[case.output].make
    group, first = spelling.GROUPS.get(case.group), case.order == "mask first"
    kind = group.kind if group is not None else ""

    def scores_of(q, k, given):
        if kind == "five dimensions":
            q = q.unflatten(1, (k.shape[1], groups))
            return product(q, k[:, :, None], given).flatten(1, 2)
        if kind == "rows":
            return product(q.flatten(1, 2)[:, None], k, given).view(*q.shape[:3], k.shape[2])
        return product(q, k, given)

    def result_of(w, v):
        if kind == "five dimensions":
            return output(w.unflatten(1, (v.shape[1], groups)), v[:, :, None]).flatten(1, 2)
        if kind == "rows":
            return output(w.flatten(1, 2)[:, None], v).view(*w.shape[:3], v.shape[-1])
        return output(w, v)

    def attention(given):
        q, k, v = layout.open(given, sizes)
        q, k = norm(q, k)
        if group is not None and group.expand is not None:
            k, v = group.expand(k, groups), group.expand(v, groups)
        i, j = _positions(q)[:, None], _positions(k)[None]
        q, k = scale.before(q, k, given)
        s, seen = cast(scores_of(q, k, given)), mask.make(i, j, given)
        if off_by:
            s = s * (1 + off_by * _signs(s))
        if first and fill is not None:
            s = fill.put(s, seen)
        s = score.put(scale.after(s, given), i, j, given)
        if not first and fill is not None:
            s = fill.put(s, seen)
        if sink:
            column = given["sink"].view(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)
            w = softmax(torch.cat([s, column.to(s.dtype)], dim=-1))[..., :-1]
        elif flat:
            w = softmax(s.flatten(0, 1)).unflatten(0, s.shape[:2])
        else:
            w = softmax(s)
        return result_of(dropout(w).to(v.dtype), v)

    return attention


def _sdpa(case: Case) -> Callable:
    layout, sizes, groups = LAYOUTS[case.layout], case.sizes, case.groups
    mask, scale, norm = MASKS[case.mask], spelling.SCALES[case.scale], spelling.NORMS[case.norm]
    group = spelling.GROUPS.get(case.group)
    low = {"-inf": -spelling.INF, "lowest": torch.finfo(DTYPES[case.dtype]).min}.get(case.sdpa_mask)

    def attention(given):
        q, k, v = layout.open(given, sizes)
        q, k = norm(q, k)
        options = {"scale": 0.4} if case.scale == "times a number" else {}
        if group is None and groups > 1:
            options["enable_gqa"] = True
        elif group is not None:
            k, v = group.expand(k, groups), group.expand(v, groups)
        q, k = scale.before(q, k, given)
        if case.sdpa_mask == "is_causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        seen = mask.make(_positions(q)[:, None], _positions(k)[None], given)
        if low is not None:
            seen = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, low)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=0.0, **options)
        return out.transpose(1, 2)

    return attention


def _block_mask(mask: Callable, q: Tensor, k: Tensor) -> Any:
    return create_block_mask(mask, *q.shape[:3], k.shape[2], device=q.device, BLOCK_SIZE=16)


def _flex(case: Case) -> Callable:
    layout, sizes, mod = LAYOUTS[case.layout], case.sizes, MODS[case.mod]

    def attention(given):
        q, k, v = layout.open(given, sizes)
        mask, score, blocks = mod.mask(given), mod.score(given), None
        if mask is not None:
            blocks = given["blocks"] if case.blocks == "given" else _block_mask(mask, q, k)
        grouped = sizes.groups > 1
        return flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=grouped, scale=0.3)

    return attention


def _hostile(case: Case) -> Callable:
    layout, sizes, run = LAYOUTS[case.layout], case.sizes, HOSTILE[case.hostile].run
    groups = case.groups

    def attention(given):
        q, k, v = layout.open(given, sizes)
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return run(q, k, v, given)

    return attention
