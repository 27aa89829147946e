"""Random cases that make sense: a row is drawn from every table that the case uses, then sizes that fit the rows.

A case is drawn by its number alone, so that it can be had again, and is the same on every target.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from tests.fuzz.case import BATCHES, SDPA_MASKS, UNUSED, Case
from tests.fuzz.tables import spelling
from tests.fuzz.tables.fills import FILLS
from tests.fuzz.tables.flexible import MODS
from tests.fuzz.tables.hostile import HOSTILE
from tests.fuzz.tables.layouts import LAYOUTS
from tests.fuzz.tables.masks import MASKS

# how often each is drawn is how often it stands there
CORES = (*["written"] * 9, "sdpa", "sdpa", "hostile", "hostile", "flex", "flex")
DTYPES = ("float32", "float32", "float32", "float32", "bfloat16", "float16", "float64")
SHAPES = ("static", "static", "marked", "automatic")
# kernels are interpreted with tiles of 32, of which the longest lengths have several
QUERIES, KEYS = (1, 2, 5, 9, 13, 17, 33, 70), (1, 3, 5, 9, 17, 21, 40, 66)
SHORT = 21
_WRITTEN = ("softmax", "score", "product", "output", "scores_are", "rank", "order")  # axes of written attention alone
SDPA_SCALES = ("none", "times a number", "of the query", "of the key", "of both", "tensor of the query")


Pick = Callable[[Iterable[Any]], Any]  # one of the values


def numbered(seed: int, number: int, target: str = "portable") -> Case:
    """Case ``number`` of a long run."""
    source = random.Random(f"{seed}/{number}")
    return replace(drawn(lambda values: source.choice(list(values))), target=target)


def drawn(pick: Pick) -> Case:
    """A case in which every row is used, or holds "-"."""
    core = pick(CORES)
    rows = {"written": _written, "sdpa": _sdpa, "flex": _flex, "hostile": _hostile}[core](pick)
    layout = pick(LAYOUTS)
    if layout == "projected" and rows["softmax"] == "by hand":
        rows["softmax"] = "by hand, shifted"  # scores are large, and exp() overflows
    return Case(**rows, core=core, layout=layout, **_sizes(pick, core, rows, layout), seed=pick(range(1000)))


def _often(pick: Pick, table: Any, plain: str) -> str:
    """The plain row half of the time, so that not everything is strange at once."""
    return plain if pick((True, False)) else pick(table)


def _written(pick: Pick) -> dict[str, Any]:
    mask = pick(MASKS)
    rows = {
        "mask": mask,
        "fill": UNUSED if mask == "none" else pick(FILLS),
        "score": _often(pick, spelling.SCORES, "plain"),
        "scale": pick(spelling.SCALES),
        "norm": _often(pick, spelling.NORMS, "none"),
        "product": pick(spelling.PRODUCTS),
        "scores_are": _often(pick, spelling.SCORES_ARE, "as they are"),
        "softmax": pick(spelling.SOFTMAXES),
        "dropout": _often(pick, spelling.DROPOUTS, "none"),
        "output": pick(spelling.OUTPUTS),
        "sink": "column" if pick(range(6)) == 0 else "none",
        "dtype": pick(DTYPES),
        "grad": pick(range(3)) == 0,
        "hidden": pick((True, False)) and MASKS[mask].rows_may_be_empty and bool(MASKS[mask].data),
    }
    rows["order"] = "mask first" if mask != "none" and pick(range(5)) == 0 else "mask last"
    if rows["order"] == "mask first" and pick((True, False)):
        rows["score"] = pick(spelling.CHANGES_FILLS)
    rows["rank"] = "three" if rows["sink"] == "none" and pick(range(5)) == 0 else "four"
    if rows["dtype"] == "float16" and rows["softmax"] == "by hand":
        rows["softmax"] = "by hand, shifted"  # exp() overflows
    return rows


def _sdpa(pick: Pick) -> dict[str, Any]:
    mask, how = pick(MASKS), pick(SDPA_MASKS)
    if mask == "none":
        how = "bool"
    if how == "is_causal":
        mask = "causal: comparison"
    return {
        "mask": mask,
        "sdpa_mask": how,
        "scale": pick(SDPA_SCALES),
        "norm": _often(pick, spelling.NORMS, "none"),
        **dict.fromkeys(_WRITTEN, UNUSED),
        "dtype": pick(DTYPES),
        "grad": pick(range(3)) == 0,
        "hidden": pick((True, False)) and MASKS[mask].rows_may_be_empty and bool(MASKS[mask].data),
    }


def _flex(pick: Pick) -> dict[str, Any]:
    mod = pick(MODS)
    unused = dict.fromkeys((*_WRITTEN, "scale", "mask"), UNUSED)
    return {
        **unused,
        "mod": mod,
        "blocks": pick(("made inside", "made inside", "given")),
        "hidden": pick((True, False)) and mod == "padding",
    }


def _hostile(pick: Pick) -> dict[str, Any]:
    name = pick(HOSTILE)
    row = HOSTILE[name]
    return {
        **dict.fromkeys((*_WRITTEN, "scale", "mask"), UNUSED),
        "hostile": name,
        "grad": not row.no_gradient and pick((True, False)),
        "hidden": bool(row.data) and pick((True, False)),
    }


def _sizes(pick: Pick, core: str, rows: dict[str, Any], layout: str) -> dict[str, Any]:
    """Sizes, shapes and the group that fit."""
    opened = LAYOUTS[layout]
    queries = pick(QUERIES)
    keys = queries if pick((True, False)) else pick(KEYS)
    heads = 1 if opened.one_head else pick((1, 2, 3))
    groups = pick((1, 1, 2, 3)) if opened.grouped and not opened.one_head else 1
    width = pick((4, 8, 16))
    value_width = width if pick((True, False)) else pick((4, 8, 12))
    square = opened.packed
    if core in ("written", "sdpa"):
        mask = MASKS[rows["mask"]]
        square = square or mask.square
        keys = max(keys, queries) if mask.at_most else keys
    elif core == "flex":
        square = square or MODS[rows["mod"]].square
    else:
        row = HOSTILE[rows["hostile"]]
        square = square or row.square or rows["hostile"] == "one tensor"
        queries, keys = max(queries, 5), max(keys, 5)
        value_width = width if row.equal_widths else value_width
    keys = queries if square else keys
    few = max(queries, keys) > SHORT  # of everything else: kernels are interpreted
    if few:
        heads, groups = min(heads, 2), min(groups, 2)
    value_width = width if opened.packed else value_width
    group = _group(pick, core, rows, heads, groups)
    if group in ("rows", "broadcast"):
        heads = 1
    shapes = pick(SHAPES)
    return {
        "batch": pick((1, 2) if few else (1, 2, 3)), "heads": heads, "groups": groups, "group": group,
        "queries": queries, "keys": keys, "width": width, "value_width": value_width,
        "shapes": shapes, "batches": "same" if shapes == "static" else pick(BATCHES),
        "threads": 3 if pick(range(15)) == 0 else 1,
    }  # fmt: skip


def _group(pick: Pick, core: str, rows: dict[str, Any], heads: int, groups: int) -> str:
    if groups == 1 or core in ("flex", "hostile"):
        return UNUSED
    expanded = [name for name, row in spelling.GROUPS.items() if row.expand is not None]
    if core == "sdpa":
        return pick([UNUSED, UNUSED, *expanded])
    leads = spelling.PRODUCTS[rows["product"]].leads and spelling.OUTPUTS[rows["output"]].leads
    return pick(list(spelling.GROUPS) if leads else expanded)
