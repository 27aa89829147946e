"""How much of a compilation is effattn's, and whether a second process finds the first one's work.

    python -m benchmarks.compile_time --out benchmarks/results/compile_time.json

SmolLM2 (30 layers) is compiled with Inductor in a process of its own with empty caches, then in another process with
the caches that the first one left. Caches are in a temporary folder: what the user has is neither used nor touched.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import torch

from benchmarks import harness, llama, measuring
from benchmarks.harness import EFFATTN

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOKENS, TINY_TOKENS = 512, 32
PASSES, WHOLE = "effattn's passes", "whole compilation"
COLD, WARM = "empty caches", "caches of another process"
RESULT = "RESULT "  # begins the line of a child's output that holds its figures
COUNTERS = {
    "graph cache hits": ("inductor", "fxgraph_cache_hit"),
    "misses": ("inductor", "fxgraph_cache_miss"),
    "bypasses": ("inductor", "fxgraph_cache_bypass"),
    "AOTAutograd hits": ("aot_autograd", "autograd_cache_hit"),
    "AOTAutograd misses": ("aot_autograd", "autograd_cache_miss"),
    "AOTAutograd bypasses": ("aot_autograd", "autograd_cache_bypass"),
}


# --- the process that compiles ---


def compile_once(options: argparse.Namespace) -> dict[str, Any]:
    """Compile the model, run it twice, and count: seconds of everything, and of our passes."""
    from effattn.compiler.options import Options
    from effattn.compiler.report import collect

    device, model, ids = torch.device(options.device), *model_and_tokens(options)
    function = harness.compiled(model, EFFATTN, options.tiny)

    def call():
        with torch.no_grad():
            return function(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    with harness.quiet(), collect.listening() as heard:
        first, _ = measuring.wall_seconds(call, device)
    again, _ = measuring.wall_seconds(call, device)
    report = heard.report(Options.read({}))
    return {
        "whole": compile_seconds(),
        "passes": report.seconds["passes"],
        "steps": {name: spent for name, spent in report.seconds.items() if name not in ("passes", "rest")},
        "first": first,
        "again": again,
        "sites": len(report.sites),
        "missed": len(report.missed),
        "counters": {name: torch._dynamo.utils.counters[group][key] for name, (group, key) in COUNTERS.items()},
    }


def model_and_tokens(options: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    if options.tiny:
        return llama.model(options, TINY_TOKENS), llama.tokens(options, 1, TINY_TOKENS)
    from effattn.models import load_smollm2, standard_library_text

    model, tokenizer = load_smollm2(device=options.device)
    return model, standard_library_text(tokenizer, TOKENS).to(options.device)


def compile_seconds() -> float:
    """Seconds in torch.compile, as torch counts them: from the first frame that Dynamo sees to running code."""
    return torch._dynamo.utils.calculate_time_spent()["entire_frame_compile"]


# --- the process that asks for it ---


def in_a_process(options: argparse.Namespace, caches: str) -> dict[str, Any]:
    """:func:`compile_once` in a new process with its caches under ``caches``."""
    folders = {
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "EFFATTN_CACHE_DIR": f"{caches}/effattn",
    }
    command = [sys.executable, "-m", "benchmarks.compile_time", "--child", "--device", options.device]
    done = subprocess.run(
        command + (["--tiny"] if options.tiny else []),
        env={**os.environ, **folders},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr.strip()[-600:]}")


def record(suite: harness.Suite, case: str, found: dict[str, Any]) -> None:
    """One compilation as two rows: its whole, and our share."""
    whole = {"sites": f"{found['sites']} of {found['sites'] + found['missed']}", **found["counters"]}
    steps = {f"{name} ms": 1e3 * spent for name, spent in found["steps"].items()}
    suite.add(harness.Row(case, WHOLE, 1e3 * found["whole"], first_s=found["first"], runs=1, more=whole))
    suite.add(harness.Row(case, PASSES, 1e3 * found["passes"], runs=1, more=steps))


def why_not(options: argparse.Namespace) -> str | None:
    """What is missing on this machine."""
    from effattn.models import ModelMissing, smollm2_file

    try:
        _ = None if options.tiny else smollm2_file()
    except ModelMissing as error:
        return str(error)
    return None


def run(argv: list[str] | None) -> int:
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", choices=(COLD, WARM), default=[COLD, WARM])
    options = parser.parse_args(argv)
    if options.child:
        print(RESULT + json.dumps(compile_once(options)), flush=True)
        return 0
    model = "a tiny Llama" if options.tiny else "SmolLM2-135M-Instruct, 30 layers"
    setting = {"model": model, "tokens": TINY_TOKENS if options.tiny else TOKENS, "dtype": "torch.float32"}
    suite = harness.Suite("compile_time", options, setting, against=(WHOLE,))
    if missing := why_not(options):
        suite.note(f"skipped: {missing}")
        return suite.finish()
    with tempfile.TemporaryDirectory() as caches:
        for case in options.cases:
            if suite.out_of_time():
                suite.note(f"no time left for {case}")
                break
            try:
                record(suite, case, in_a_process(options, caches))
            except RuntimeError as error:
                suite.add(harness.Row(case, WHOLE, error=str(error)))
    suite.bar(COLD, PASSES, WHOLE, 0.10)
    return suite.finish()


if __name__ == "__main__":
    harness.main(run)
