"""One training step, forward and backward: eager, Inductor, effattn.

    python -m benchmarks.train_step --out benchmarks/results/train_step.json

With left padding or packed documents the attention is a generated kernel with a generated gradient, where Inductor
makes a mask of N x N. Checkpointed, each layer is computed again for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness, llama
from benchmarks.harness import EAGER, EFFATTN, INDUCTOR

LAYERS = 2
NO_MASK, PADDED, CHECKPOINTED = "no mask", "left padding", "left padding, checkpointed"
PACKED = "packed documents"
KINDS = (PADDED, PACKED, NO_MASK, CHECKPOINTED)
DOCUMENT = 1000  # tokens of one of the packed documents
AT_MOST = {PADDED: 0.72, PACKED: 0.6}  # of Inductor's time at the longest length; the others: 1
LENGTHS, TINY_LENGTHS = (8192, 4096), (48,)
LEARNT = ("q_proj", "k_proj", "v_proj")  # what gradients of attention flow into
IGNORED = -100  # the label of a token that the loss leaves out


def inputs(suite: harness.Suite, kind: str, length: int) -> dict[str, Any]:
    """Keyword arguments of one step: two sequences, the second padded on the left or both packed, if asked for."""
    ids = llama.tokens(suite.options, 2, length)
    given: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    if kind == PACKED:
        document = min(DOCUMENT, length // 3)
        given["position_ids"] = (torch.arange(length, device=ids.device) % document)[None]
    elif kind != NO_MASK:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][1:, : length // 4] = 0
        given["labels"][1:, : length // 4] = IGNORED
    return given


def step(model: Any, function: Any, given: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """A function that computes loss and gradients, and returns those of the projections into attention."""

    def run():
        model.zero_grad(set_to_none=True)
        function(**given).loss.backward()
        return attention_gradients(model)

    return run


def attention_gradients(model: Any) -> torch.Tensor:
    """The gradients of every q, k and v projection, one after the other."""
    names = [name for name, _ in model.named_parameters() if any(part in name for part in LEARNT)]
    return torch.cat([model.get_parameter(name).grad.flatten() for name in names])


def measure(suite: harness.Suite, model: Any, kind: str, length: int) -> None:
    case, given = f"{kind}, N {length:,}", inputs(suite, kind, length)
    model.gradient_checkpointing_disable()
    if kind == CHECKPOINTED:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for backend in (EAGER, INDUCTOR, EFFATTN):
        suite.measure(case, backend, lambda backend=backend: step(model, suite.compiled(model, backend), given))
        model.zero_grad(set_to_none=True)
    suite.bar(case, EFFATTN, INDUCTOR, AT_MOST.get(kind, 1.0) if length == max(LENGTHS) else 1.0)
    suite.bar(case, EFFATTN, INDUCTOR, 1.0, "peak_gib")


def run(argv: list[str] | None) -> int:
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args(argv)
    lengths = options.lengths or (TINY_LENGTHS if options.tiny else LENGTHS)
    setting = {**llama.setting(options, LAYERS), "batch": 2}
    suite = harness.Suite("train_step", options, setting, against=(EAGER, INDUCTOR))
    model = llama.model(options, max(lengths), LAYERS).train()  # it has no dropout; only then are parts checkpointed
    for length in lengths:
        for kind in options.kinds:
            measure(suite, model, kind, length)
    return suite.finish()


if __name__ == "__main__":
    harness.main(run)
