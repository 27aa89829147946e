"""What a compilation by effattn takes over one by Inductor, for small models of many architectures.

    python -m benchmarks.compile_zoo --architectures 24 --out benchmarks/results/compile_zoo.json

The first call of each model is timed with both, with empty caches, in alternating order: who is the first to compile an
architecture pays for what both then have. Seconds of the processor are kept beside those of the clock: other work on
the machine does not count in them.
"""

from __future__ import annotations

import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import EFFATTN, INDUCTOR

ZOO = pathlib.Path(__file__).resolve().parents[1] / "tests" / "zoo"
# of every kind: decoders, encoders, both, pictures, sounds, several at once; attention as each has it by default
SAMPLE = (
    "llama", "bert", "t5", "vit", "gpt2", "clip", "whisper", "gemma2", "swin", "mixtral", "bart", "wav2vec2",
    "gpt_oss", "deberta-v2", "bloom", "llava", "deepseek_v3", "distilbert", "opt", "dinov2", "phi3", "electra",
    "blip", "gpt_neox", "mpt", "beit", "qwen3", "xlnet", "olmo2", "segformer",
)  # fmt: skip
MEDIAN, RATIO, PROCESSOR_RATIO = "median", "time over Inductor's", "processor time over Inductor's"


def run(argv: list[str] | None) -> int:
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--architectures", type=int, default=len(SAMPLE), help="how many of the sample")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(ZOO))
    names = SAMPLE[: 2 if options.tiny else options.architectures]
    setting = {"attention": "by default", "dtype": "torch.float32", "compiling threads": 1}
    suite = harness.Suite("compile_zoo", options, setting, against=(INDUCTOR,))
    torch._inductor.config.compile_threads = 1
    for variant in (INDUCTOR, EFFATTN):  # what each imports and prepares once is no part of any model
        attention, text = torch.nn.MultiheadAttention(8, 2).eval(), torch.ones(4, 8)
        first_call(suite, variant, attention, {"query": text, "key": text, "value": text})
    for number, name in enumerate(names):
        if suite.out_of_time():
            suite.note(f"no time left for {', '.join(names[number:])}")
            break
        measure(suite, name, (INDUCTOR, EFFATTN) if number % 2 else (EFFATTN, INDUCTOR))
    summarize(suite)
    return suite.finish()


def measure(suite: harness.Suite, name: str, variants: tuple[str, ...]) -> None:
    """Both compilations of one architecture."""
    from building import build

    built = build(name)
    for variant in variants:
        try:
            suite.add(harness.Row(name, variant, runs=1, **first_call(suite, variant, built.model, built.given)))
        except Exception as error:  # one that fails must not take the others with it
            suite.add(harness.Row(name, variant, error=f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def first_call(suite: harness.Suite, variant: str, model: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the first call with empty caches, and seconds of the processor, those of g++ included."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache(), torch._inductor.config.patch(force_disable_caches=True), torch.no_grad(), harness.quiet():
        function = suite.compiled(model, variant)
        before, start = _processor_seconds(), time.perf_counter()
        function(**given)
        wall = time.perf_counter() - start
    return {"ms": 1e3 * wall, "more": {"processor s": _processor_seconds() - before}}


def summarize(suite: harness.Suite) -> None:
    """The median of the ratios, as a case of its own."""
    rows = {(row.case, row.variant): row for row in suite.rows if row.error is None}
    pairs = [(row, rows[case, INDUCTOR]) for (case, variant), row in rows.items()
             if variant == EFFATTN and (case, INDUCTOR) in rows]  # fmt: skip
    if not pairs:
        return
    wall = statistics.median(ours.ms / theirs.ms for ours, theirs in pairs)
    processor = statistics.median(ours.more["processor s"] / theirs.more["processor s"] for ours, theirs in pairs)
    case = f"{MEDIAN} of {len(pairs)}"
    suite.add(harness.Row(case, INDUCTOR, more={RATIO: 1.0, PROCESSOR_RATIO: 1.0}))
    suite.add(harness.Row(case, EFFATTN, more={RATIO: wall, PROCESSOR_RATIO: processor}))
    suite.bar(case, EFFATTN, INDUCTOR, 1.10, RATIO)


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    harness.main(run)
