"""The main job, start to end, on a real model: `make demo`, or `python examples/demo.py --help`.

Loads SmolLM2-135M-Instruct, compiles it with `backend="effattn"`, shows what was found and done, that the answers are
the same, and what two approximate policies cost and save on long text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import pathlib
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

QUESTION = "What is attention in a neural network? Answer in one sentence."
MODEL_LIMIT = 8192  # positions that SmolLM2 was trained for
STEPS, STEPS_GPU = 11, 13  # of the whole demonstration, which a progress bar counts


@dataclass(frozen=True)
class Row:
    """One line of the last table."""

    name: str
    perplexity: float
    density: float
    seconds: float
    compilation: float  # seconds up to the first answer, less a run


class Screen:
    """Sections, one progress bar over all steps, and a line for every step that is done."""

    def __init__(self, console: Console, steps: int):
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.all = self.progress.add_task("", total=steps)

    def section(self, title: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{title}", align="left")

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        self.progress.update(self.all, description=text)
        start = time.perf_counter()
        yield
        self.progress.advance(self.all)
        self.console.print(f"[green]done[/] {text} [dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)

    def show(self, body: Any) -> None:
        if isinstance(body, str):
            self.console.print("  " + body.replace("\n", "\n  "), highlight=False, soft_wrap=True)
        else:
            self.console.print(Padding(body, (0, 0, 0, 2)), highlight=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--tokens", type=int, default=4096, help="length of the text for the policies (default 4096)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--words", type=int, default=40, help="most tokens to generate (default 40)")
    parser.add_argument("--rest", choices=("inductor", "eager"), help="what compiles all that is not attention")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write every figure to FILE")
    options = parser.parse_args(argv)
    if not 64 <= options.tokens <= MODEL_LIMIT:
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
        import torch

        import effattn  # for explain; the backend itself needs no import
        from effattn.evaluate import density_of
        from effattn.models import ModelMissing, load_smollm2, standard_library_text

        quiet()
    if options.device == "cuda" and not torch.cuda.is_available():
        screen.console.print("[red]error:[/] --device cuda, but torch sees no GPU")
        return 1
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rest, missing = rest_for(device)
    rest = options.rest or rest
    with screen.step("load SmolLM2-135M-Instruct"):
        try:
            model, tokenizer = load_smollm2(device=device)
        except ModelMissing as error:
            screen.console.print(f"[red]error:[/] {error}", markup=True)
            return 1
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    layers = model.config.num_hidden_layers
    screen.show(f"{layers} layers, float32, on {name}; torch {torch.__version__}; attention: transformers' sdpa")
    if device == "cuda":
        screen.progress.update(screen.all, total=STEPS_GPU)
    else:
        screen.show("no GPU here: what would be a generated kernel runs through ATen, blockwise")
    if missing and not options.rest:
        screen.show(f"[yellow]all that is not attention runs eagerly:[/] {missing}")

    screen.section("2. What effattn sees in it")
    text = standard_library_text(tokenizer, options.tokens).to(device)
    short = text[:, : min(512, options.tokens)]
    with screen.step("effattn.explain(model, ids)"), torch.no_grad():
        report = effattn.explain(model, input_ids=short, use_cache=False)
    screen.show(escape(str(report)))
    found, softmaxes = len(report.sites), len(report.sites) + len(report.missed)

    screen.section('3. fast = torch.compile(model, backend="effattn")')
    fast = torch.compile(model, backend="effattn", options={"rest": rest})
    with screen.step(f"compile, and run {short.shape[1]} tokens"), torch.no_grad():
        ours = fast(input_ids=of_any_length(short), use_cache=False).logits
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

    screen.section(f"4. Policies: {options.tokens:,} tokens of the Python standard library's source")
    if device == "cuda":
        model = model.bfloat16()
        screen.show("in bfloat16 from here on, as models run on a GPU")
    if device == "cpu" and not options.rest:
        rest = "eager"  # to compile it takes Inductor a minute a policy, and attention is what differs
        screen.show("all that is not attention runs eagerly from here on, in every row")
    rows = list(policies(model, text, rest, screen))
    screen.show(table(rows))
    screen.show(
        "Window and power leave pairs of tokens out, from 4,096 keys on. What that costs in perplexity depends on\n"
        "model and text; density, kept pairs / causal pairs, falls as texts get longer: at 65,536 tokens it is "
        f"{density_of('window', 65_536):.3f} and {density_of('power', 65_536):.3f}."
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
            "tokens": options.tokens,
            "policies": [vars(row) for row in rows],
        }
        options.json.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        screen.console.print(f"wrote {options.json}", highlight=False)
    return 0


def quiet() -> None:
    """Only what concerns the reader: no advice of compilers, and not twice what the screen says."""
    warnings.filterwarnings("ignore", message="no GPU here")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor.*")
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)


def of_any_length(ids: Any) -> Any:
    """``ids``, marked so that what is compiled for them serves every length.

    ``dynamic=True`` instead compiles three times. It makes the floats of the modules symbolic too, on which Inductor
    gives up half-way to begin again. And where ``ids`` are a slice it guards the sizes of the whole tensor, so that ids
    that are no slice need a graph of their own; ``contiguous`` copies no slice of a batch of one.
    """
    import torch

    torch._dynamo.mark_dynamic(ids, 1)
    return ids


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


def policies(model: Any, text: Any, rest: str, screen: Screen) -> Iterator[Row]:
    """The uncompiled model, then each policy: a row as soon as it is measured."""
    import torch

    from effattn.evaluate import density_of, perplexity, timed
    from effattn.policy import Policy

    length = text.shape[1]
    again = 1 if text.is_cuda else 0  # kernels are generated when they are first needed: that call is no measure
    with screen.step("dense, uncompiled"):
        dense = timed(lambda: perplexity(model, text), again)
    yield Row("uncompiled", dense.value.value, 1.0, dense.value.seconds, 0.0)
    # on a CPU every compilation takes long, and section 3 has shown what exact does
    for name in ("exact", "window", "power") if text.is_cuda else ("window", "power"):
        body = torch.compile(model.base_model, backend="effattn", options={"policy": name, "rest": rest})
        few = of_any_length(text[:, :64])
        with screen.step(f"policy {name}: compile"), torch.no_grad():
            compiled = timed(lambda body=body, few=few: body(few, use_cache=False), 0)
        with screen.step(f"policy {name}: {length:,} tokens"):
            measured = timed(lambda body=body: perplexity(model, text, body), again)
        kept = 1.0
        for rule in Policy.named(name).rules[:1]:
            form = rule.preference[0]
            kept = density_of(form, length, rule.params_of(form).model_dump(), rule.min_length)
        compilation = compiled.first + measured.first - measured.median
        yield Row(name, measured.value.value, kept, measured.value.seconds, compilation)


def table(rows: list[Row]) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0))
    made.add_column("policy")
    for heading in ("perplexity", "against dense", "density", "seconds", "to compile"):
        made.add_column(heading, justify="right")
    dense = rows[0].perplexity
    for row in rows:
        change = f"{100 * (row.perplexity / dense - 1):+.2f} %"
        figures = (
            f"{row.perplexity:.3f}",
            change,
            f"{row.density:.3f}",
            f"{row.seconds:.2f}",
            f"{row.compilation:.1f}" if row.compilation else "",
        )
        made.add_row(row.name, *figures)
    return made


if __name__ == "__main__":
    sys.exit(main())
