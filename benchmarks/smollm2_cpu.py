"""SmolLM2 on the CPU in float32: logits and greedy text against Inductor, in one run.

python benchmarks/smollm2_cpu.py --out smollm2_cpu.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from effattn.models import load_smollm2

PROMPT = "The capital of France is"
TEXT = "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n" * 12


def greedy(model, function, ids: torch.Tensor, tokens: int) -> tuple[list[int], torch.Tensor]:
    """(generated ids, logits of the prompt): prefill into a DynamicCache, then one token at a time."""
    out = function(ids)
    first = out.logits
    found = []
    for _ in range(tokens):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(token))
        out = function(token, past_key_values=out.past_key_values)
    return found, first


def measure(model, name: str, prompt: torch.Tensor, text: torch.Tensor, tokens: int) -> dict:
    torch._dynamo.reset()
    start = time.perf_counter()
    function = torch.compile(model, backend=name)
    with torch.no_grad():
        ids, _ = greedy(model, function, prompt, tokens)
        logits = function(text, use_cache=False).logits
    return {"ids": ids, "logits": logits, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="smollm2_cpu.json")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    model, tokenizer = load_smollm2()
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = tokenizer(TEXT, return_tensors="pt").input_ids
    results = {name: measure(model, name, prompt, text, arguments.tokens) for name in ("inductor", "effattn")}
    peer, ours = results["inductor"], results["effattn"]
    record = {
        "torch": torch.__version__,
        "tokens": arguments.tokens,
        "same_text": peer["ids"] == ours["ids"],
        "largest_logit_difference": (peer["logits"] - ours["logits"]).abs().max().item(),
        "largest_logit": peer["logits"].abs().max().item(),
        "seconds": {name: result["seconds"] for name, result in results.items()},
        "text": tokenizer.decode(ours["ids"]),
    }
    Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
