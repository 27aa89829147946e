"""Results as a page of the documentation, and as the table in README.md.

    python -m benchmarks.report [FOLDER] [--out docs/performance.md] [--readme README.md]

Both are made from the files of results alone, so figures in them are never typed by hand.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from typing import Any

from benchmarks import keeping, ratios, tables
from benchmarks.harness import EAGER, EFFATTN, INDUCTOR

ROOT = pathlib.Path(__file__).resolve().parents[1]
ORDER = (
    "prefill_llama",
    "power_vs_flex",
    "selectors",
    "linear_lightning",
    "decode_static",
    "train_step",
    "compile_time",
    "compile_zoo",
)
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
    "selectors": (
        "Forms that choose at run time",
        "Dense attention, whole forms, and their selections alone, on queries and keys captured from SmolLM2; then a "
        "prefill of a model at a density of a tenth against the same model lossless. `ms / density` is the time over "
        "the share of causal pairs that were visited.",
    ),
    "linear_lightning": (
        "Lightning attention",
        "Causal linear attention with one decay per head, [1, N, 32, 128] in bfloat16, against fla-core's kernel with "
        "the same slopes; then forward and backward, in nanoseconds per token, which should not depend on the length. "
        "At 8,192 tokens a plain call is as long as the host takes for it; recorded in a CUDA graph it is not.",
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
    "compile_zoo": (
        "Compilation of many architectures",
        "The first call of small models of many architectures of transformers, on a CPU with empty caches. Processor "
        "time is that of the process and of the compilers that it calls.",
    ),
}
CPU = "smollm2_cpu.json"
README_CASES = (  # what no other compiler takes away: padding, gradients, caches; (benchmark, case, what it is)
    ("prefill_llama", "left padding, N 65,536", "two prompts of up to 65,536 tokens, one padded, 4 layers"),
    ("prefill_llama", "packed documents, N 32,768", "documents of 5,000 tokens packed into 32,768, 4 layers"),
    ("train_step", "left padding, N 8,192", "training step, 2 x 8,192 tokens, padded, 2 layers"),
    ("train_step", "left padding, checkpointed, N 8,192", "the same with gradient checkpointing"),
    ("decode_static", "131,072 slots, 800 live", "one token, static cache of 131,072, 800 of them used, 4 layers"),
)
README_VARIANTS = {
    EAGER: "eager",
    INDUCTOR: "`torch.compile` (Inductor)",
    EFFATTN: '`torch.compile(backend="effattn")`',
}
BEGIN, END = "<!-- made by python -m benchmarks.report --readme README.md -->", "<!-- end of what was made -->"
MARKED = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
HEAD = """# Performance

Made by `python -m benchmarks.report` from the results of `python -m benchmarks.gpu_all`; do not edit.

Every ratio is between two variants of one case in one run on one machine. Where a table holds several runs, its last
column says which one a case comes from; each run has its own date, commit and versions. Times are medians after
warm-up, by CUDA events on a GPU. Peak memory is the largest that PyTorch's allocator held, weights included; "above
weights" is what the call itself added. A bar is the ratio that the project asks of itself.
"""


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The results of a folder in the order of the page. Raises FileNotFoundError if there are none."""
    found = [keeping.read(folder / f"{name}.json") for name in ORDER]
    known = {result["name"]: result for result in found if result is not None}
    if not known:
        raise FileNotFoundError(f"{folder} holds no results; make some: python -m benchmarks.gpu_all --out {folder}")
    return [known[name] for name in ORDER if name in known]


def page(results: list[dict[str, Any]], *more: str) -> str:
    """The whole page in Markdown; ``more`` are further sections."""
    parts = [HEAD, bars_section(results), *[section(result) for result in results], *more]
    return "\n".join(part for part in parts if part)


def bars_section(results: list[dict[str, Any]]) -> str:
    headings = ["benchmark", *tables.bars([])[0]]
    lines = [[result["name"], *line] for result in results for line in tables.bars([result])[1]]
    return f"## Asked and reached\n\n{tables.markdown(headings, lines)}\n" if lines else ""


def section(result: dict[str, Any]) -> str:
    """One benchmark: what, on what, when; its table; its notes."""
    title, text = ABOUT[result["name"]]
    runs = result["runs"]
    setting = ", ".join(f"{name} {value}" for name, value in runs[-1]["setting"].items())
    tiny = "\n\n**Tiny sizes: these figures say only that the benchmark runs.**" if result["tiny"] else ""
    notes = "".join(f"\n- {note}" for run in runs for note in run["notes"])
    return (
        f"## {title}\n\n{text}{tiny}\n\n{said_of(runs)}  \n{setting}.\n\n"
        f"{tables.markdown(*tables.rows(result))}\n" + (f"{notes}\n" if notes else "")
    )


def said_of(runs: list[dict[str, Any]]) -> str:
    """On what and when each run was measured; numbered as in the tables if there are several."""
    lines = []
    for number, run in enumerate(runs, start=1):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        commit = f" at commit {run['commit']}" if run.get("commit") else ""
        start = f"Run {number}: " if len(runs) > 1 else ""
        lines.append(f"{start}{run['device']}, {run['date']}{commit}; {versions}.")
    return "  \n".join(lines)


def cpu_section(folder: pathlib.Path) -> str:
    """What ``benchmarks/smollm2_cpu.py`` found: the same text as Inductor's. Empty if it was not run."""
    path = folder / CPU
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    same = "the same" if found["same_text"] else "**another**"
    return (
        f"## The same text\n\nSmolLM2-135M-Instruct in float32 on a CPU, torch {found['torch']}: greedy decoding of "
        f"{found['tokens']} tokens gives {same} text by effattn and by Inductor. The largest difference between their "
        f"logits of a long prompt is {found['largest_logit_difference']:.2g}, where the largest logit is "
        f"{found['largest_logit']:.3g}.\n"
    )


# --- the table in README.md ---


def readme_table(results: list[dict[str, Any]]) -> str:
    """The cases that README.md begins with, as they stand between the marks there."""
    lines, devices, dates = [], set(), set()
    for name, case, called in README_CASES:
        result = next(result for result in results if result["name"] == name)
        row = next(row for row in result["rows"] if row["case"] == case)
        devices.add(result["runs"][row["run"]]["device"])
        dates.add(result["runs"][row["run"]]["date"][:10])
        cells = []
        for variant in README_VARIANTS:
            ms = ratios.cost(result["rows"], case, variant)
            gib = ratios.cost(result["rows"], case, variant, "above_gib")
            if ms is None or gib is None:
                raise ValueError(f"{variant} of {case!r} was not measured")
            bold = "**" if variant == EFFATTN else ""
            cells.append(f"{bold}{f'{ms:,.0f}' if ms >= 100 else f'{ms:.3g}'} ms, {gib:.1f} GiB{bold}")
        lines.append(f"| {called} | {' | '.join(cells)} |")
    table = "\n".join([f"| | {' | '.join(README_VARIANTS.values())} |", "|---|---|---|---|", *lines])
    return (
        f"Llama, 8B shape, bf16, transformers' SDPA attention, one {' or '.join(sorted(devices))}, each line one run "
        f"({', '.join(sorted(dates))}).\nTime, and memory beside the weights "
        f"([docs/performance.md](docs/performance.md) has every number, device and date):\n\n{table}"
    )


def with_table(readme: str, table: str) -> str:
    """``readme`` with ``table`` between its marks. Raises ValueError if it has no marks."""
    if not MARKED.search(readme):
        raise ValueError(f"the file lacks the lines {BEGIN} and {END}")
    return MARKED.sub(lambda _: f"{BEGIN}\n{table}\n{END}", readme)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--readme", type=pathlib.Path, help="renew the table of this file too")
    options = parser.parse_args(argv)
    try:
        results = load(options.folder)
        written = {options.out: page(results, cpu_section(options.folder))}
        if options.readme is not None:
            written[options.readme] = with_table(options.readme.read_text(encoding="utf-8"), readme_table(results))
    except (FileNotFoundError, ValueError, StopIteration) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
