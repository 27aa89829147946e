"""Results as a page of the documentation.

    python -m benchmarks.report [FOLDER] [--out docs/performance.md]

The page is made from the files of a run alone, so figures in it are never typed by hand.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from benchmarks import tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
ORDER = ("prefill_llama", "power_vs_flex", "linear_lightning", "decode_static", "train_step", "compile_time")
ABOUT = {
    "prefill_llama": (
        "Prefill of a Hugging Face model",
        "One forward over a long input, `use_cache=False`, `logits_to_keep=1`. Without a mask, with an "
        "`attention_mask` of ones as a tokenizer returns it, and as a batch of two of which one is padded on the left. "
        "The difference is that of the logits from eager's, in bf16; Inductor's own stands beside it.",
    ),
    "power_vs_flex": (
        "Sparse forms against FlexAttention",
        "`effattn.attention` against compiled `flex_attention` with the same mask, forward, static shapes. A block "
        "mask is something that only FlexAttention needs: its cost is shown on its own, and is in no other figure.",
    ),
    "linear_lightning": (
        "Lightning attention",
        "Causal linear attention with one decay per head, [1, N, 32, 128] in bfloat16, against fla-core's kernel with "
        "the same slopes; then forward and backward, in nanoseconds per token, which should not depend on the length.",
    ),
    "decode_static": (
        "A decode step over a static cache",
        "One token through the model with a `StaticCache` that is mostly empty, as it is at the start of a long "
        'generation, by Inductor and effattn, with and without CUDA graphs (`mode="reduce-overhead"`).',
    ),
    "train_step": (
        "A training step",
        "Loss and all gradients, two sequences, without a mask and with left padding. The difference is that of the "
        "gradients of the query, key and value projections from eager's.",
    ),
    "compile_time": (
        "Compilation",
        "SmolLM2-135M-Instruct (30 layers) with Inductor in a new process: with empty caches, then again with the "
        "caches that the first process left.",
    ),
}
HEAD = """# Performance

Made by `python -m benchmarks.report` from the results of `python -m benchmarks.gpu_all`; do not edit.

Every ratio is between two variants of one case in one run on one machine. Times are medians after warm-up, by CUDA
events on a GPU. Peak memory is the largest that PyTorch's allocator held, weights included; "above weights" is
what the call itself added. A bar is the ratio that the project asks of itself.
"""


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The results of a folder in the order of the page. Raises FileNotFoundError if there are none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    known = {result["name"]: result for result in found if result.get("name") in ORDER}
    if not known:
        raise FileNotFoundError(f"{folder} holds no results; make some: python -m benchmarks.gpu_all --out {folder}")
    return [known[name] for name in ORDER if name in known]


def page(results: list[dict[str, Any]]) -> str:
    """The whole page in Markdown."""
    parts = [HEAD, bars_section(results), *[section(result) for result in results]]
    return "\n".join(part for part in parts if part)


def bars_section(results: list[dict[str, Any]]) -> str:
    headings, lines = tables.bars(results)
    return f"## Asked and reached\n\n{tables.markdown(headings, lines)}\n" if lines else ""


def section(result: dict[str, Any]) -> str:
    """One benchmark: what, on what, when; its table; its notes."""
    title, text = ABOUT[result["name"]]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    setting = ", ".join(f"{name} {value}" for name, value in result["setting"].items())
    tiny = "\n\n**Tiny sizes: these figures say only that the benchmark runs.**" if result["tiny"] else ""
    notes = "".join(f"\n- {note}" for note in result["notes"])
    return (
        f"## {title}\n\n{text}{tiny}\n\n{result['device']}, {result['date']}; {versions}.  \n{setting}.\n\n"
        f"{tables.markdown(*tables.rows(result))}\n" + (f"{notes}\n" if notes else "")
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args(argv)
    try:
        text = page(load(options.folder))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
