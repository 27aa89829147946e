"""The main job, start to end, on a real model: `make demo`, or `python examples/demo.py --help`.

Loads SmolLM2-135M-Instruct, compiles it with `backend="effattn"`, shows what was found and done, that the answers are
the same, what a long padded prompt costs eager, by Inductor and by effattn, and what approximate policies cost in
perplexity. Figures are of this run on this machine; what is no gain here says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib
import shutil
import sys
import sysconfig
import time
import warnings
from itertools import chain
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text
from screen import Screen

QUESTION = "What is attention in a neural network? Answer in one sentence."
MODEL_LIMIT = 8192  # positions that SmolLM2 was trained for
STEPS, STEPS_GPU = 12, 16  # of the whole demonstration, which a progress bar counts


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--tokens", type=int, help="length of the text for the policies (default 4096, on a CPU 2048)")
    parser.add_argument("--picture", type=pathlib.Path, default=pathlib.Path("effattn-demo.svg"), metavar="FILE")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--words", type=int, default=40, help="most tokens to generate (default 40)")
    parser.add_argument("--rest", choices=("inductor", "eager"), help="what compiles all that is not attention")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write every figure to FILE")
    options = parser.parse_args(argv)
    if not 64 <= (options.tokens or 64) <= MODEL_LIMIT:
        parser.error(f"--tokens must be from 64 to {MODEL_LIMIT}, the positions that the model was trained for")
    if options.words < 1:
        parser.error("--words must be 1 or more")
    return options


def rest_for(device: str) -> tuple[str, str]:
    """What can compile the rest of the graph here, and what is missing if not Inductor."""
    if device == "cuda":
        return "inductor", ""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "eager", "Inductor needs a C++ compiler on the CPU (Debian: apt install g++)"
    if not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "eager", "Inductor needs Python's headers on the CPU (Debian: apt install python3-dev)"
    return "inductor", ""


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    console = Console()
    screen = Screen(console, STEPS)
    try:
        with screen.progress:
            return run(options, screen)
    except KeyboardInterrupt:
        console.print("\nstopped")
        return 130


def run(options: argparse.Namespace, screen: Screen) -> int:
    start = time.perf_counter()
    screen.section("1. A model that knows nothing of effattn")
    with screen.step("import torch and effattn"):
        import comparison
        import policies
        import torch

        import effattn  # for explain; the backend itself needs no import
        from effattn.evaluate import density_of
        from effattn.models import ModelMissing, load_smollm2, standard_library_text

        quiet()
    if options.device == "cuda" and not torch.cuda.is_available():
        screen.console.print("[red]error:[/] --device cuda, but torch sees no GPU")
        return 1
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokens = options.tokens or (4096 if device == "cuda" else 2048)
    inner, missing = rest_for(device)
    inner = options.rest or inner
    # on a CPU the whole model would take Inductor a minute, and attention is what differs
    rest = options.rest or ("inductor" if device == "cuda" else "eager")
    with screen.step("load SmolLM2-135M-Instruct"):
        try:
            model, tokenizer = load_smollm2(device=device)
        except ModelMissing as error:
            screen.console.print(f"[red]error:[/] {error}", markup=True)
            return 1
    name = torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    layers = model.config.num_hidden_layers
    screen.show(f"{layers} layers, float32, on {name}; torch {torch.__version__}; attention: transformers' sdpa")
    if device == "cuda":
        screen.progress.update(screen.all, total=STEPS_GPU)
    else:
        screen.show("no GPU here: what would be a generated kernel runs through ATen, blockwise")
    if missing and not options.rest:
        screen.show(f"[yellow]no comparison with Inductor, and all that is not attention runs eagerly:[/] {missing}")

    screen.section("2. What effattn sees in it")
    text = standard_library_text(tokenizer, max(tokens, 2 * comparison.PADDED[device][1])).to(device)
    short = text[:, :512]
    with screen.step("effattn.explain(model, ids)"), torch.no_grad():
        report = effattn.explain(model, input_ids=short, use_cache=False)
    screen.show(escape(str(report)))
    found, softmaxes = len(report.sites), len(report.sites) + len(report.missed)

    screen.section('3. fast = torch.compile(model, backend="effattn")')
    fast = torch.compile(model, backend="effattn", options={"rest": rest})
    with screen.step(f"compile, and run {short.shape[1]} tokens"), torch.no_grad():
        ours = fast(input_ids=policies.of_any_length(short), use_cache=False).logits
    with screen.step("run the uncompiled model on the same"), torch.no_grad():
        theirs = model(input_ids=short, use_cache=False).logits
    difference = (ours - theirs).abs().max().item()
    size = theirs.abs().max().item()
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    screen.show(f"largest logit difference {difference:.1e}, where the largest logit is {size:.1f}")
    screen.show(f"most likely next token: the same at {same} of {short.shape[1]} positions")
    del ours, theirs
    with screen.step("answer a question, token by token, with the compiled model"):
        answer, per_token = generate(fast, tokenizer, device, options.words)
    screen.show(Text.assemble(("question  ", "dim"), QUESTION))
    screen.show(Text.assemble(("answer    ", "dim"), (answer, "bold cyan"), (f"  {per_token:.2f} s a token", "dim")))

    screen.section("4. What a long padded prompt costs")
    if device == "cuda":
        model = model.bfloat16()
        screen.show("in bfloat16 from here on, as models run on a GPU")
    backends = [each for each in comparison.BACKENDS if each != "Inductor" or inner == "inductor"]
    measured: list[comparison.Measured] = []
    padded = comparison.padded(model, text, backends, inner, screen)
    for rows in chain(padded, comparison.linear(device, backends, inner, screen)):
        measured += rows
        screen.show(comparison.as_table(rows))
        screen.show(f"effattn {comparison.verdict(rows)}")
    path = comparison.write_picture(measured, f"SmolLM2-135M and linear attention on {name}", options.picture)
    screen.show(f"the same as a picture: {path}")

    screen.section(f"5. Policies: {tokens:,} tokens of the Python standard library's source")
    costs = list(policies.policies(model, text[:, :tokens], rest, screen))
    screen.show(policies.as_table(costs))
    slower = [row.name for row in costs if row.seconds > costs[0].seconds]
    if slower:
        screen.show(f"{' and '.join(slower)}: no gain of time here; on a GPU, kernels skip what these leave out")
    screen.show(
        "A policy leaves pairs of tokens out. What that costs in perplexity depends on model and text; density, kept\n"
        "pairs / causal pairs, falls as texts get longer: with the policies that ship it is at 65,536 tokens "
        f"{density_of('window', 65_536):.3f} (window) and {density_of('power', 65_536):.3f} (power)."
    )
    total = time.perf_counter() - start
    screen.console.print(f"\nAll of it took {total:.0f} s.", highlight=False)
    if options.json:
        body = {
            "device": name,
            "torch": torch.__version__,
            "rest": rest,
            "seconds": total,
            "sites": {"found": found, "of": softmaxes, "predicates": sorted({site.predicate for site in report.sites})},
            "largest_logit_difference": difference,
            "answer": answer,
            "measured": [vars(row) for row in measured],
            "tokens": tokens,
            "policies": [vars(row) for row in costs],
        }
        options.json.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        screen.console.print(f"wrote {options.json}", highlight=False)
    return 0


def quiet() -> None:
    """Only what concerns the reader: no advice of compilers, and not twice what the screen says."""
    warnings.filterwarnings("ignore", message="no GPU here")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor.*")
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)


def generate(fast: Any, tokenizer: Any, device: str, most: int) -> tuple[str, float]:
    """The most likely answer to QUESTION, and seconds a token: the whole text goes through the graph every time."""
    import torch

    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"].to(device)
    start, begin = ids.shape[1], time.perf_counter()
    with torch.no_grad():
        while ids.shape[1] < start + most:
            token = fast(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            if token.item() == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token], dim=1)
    made = max(1, ids.shape[1] - start)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip(), (time.perf_counter() - begin) / made


if __name__ == "__main__":
    sys.exit(main())
