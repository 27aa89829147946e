"""Forms that choose their keys at run time against dense attention, on queries and keys of a real model.

    python -m benchmarks.selectors --out benchmarks/results/selectors.json

The time of a selector does not depend on its data, but how much it keeps does: query, key and value come from the
middle layer of SmolLM2, run over the standard library's source with its rotary embeddings scaled, and its heads are
repeated to 32 and 8. ``ms / density`` is the time divided by the share of causal pairs that were visited: what it would
be for all of them, and so comparable to dense.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import effattn
from benchmarks import harness, llama
from benchmarks.harness import EFFATTN
from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import Nk, Nq, k, q, s
from effattn.ir.plan import Plan, Sparsity
from effattn.ir.site import Layout, called_site
from effattn.runtime.selection import portable_steps, triton_steps
from effattn.runtime.selection.block_list import BlockList
from effattn.runtime.selection.run import select

CUDNN, FLASH = "dense, cuDNN", "dense, flash"
LENGTHS, TINY_LENGTHS = (32_768, 131_072), (300,)
HEADS, KV_HEADS = 32, 8
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "proxy": ("proxy", {}),
    "proxy, one group": ("proxy", {"groups": 1}),
    "dhsa": ("dhsa", {}),
    "dhsa, tokens": ("dhsa", {"unit": 1}),
}
TINY_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "proxy": ("proxy", {"block": 32, "least": 64}),
    "dhsa": ("dhsa", {"block": 32, "unit": 16}),
}
BARRED = ("proxy", "proxy, one group", "dhsa")  # of a list of tokens nothing is asked
LAYER = 15
PER_DENSITY = "ms / density"


def inputs(options: argparse.Namespace, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """query [1, Hq, N, D], key and value [1, Hkv, N, D] of one layer of SmolLM2, heads repeated; tiny: random."""
    if options.tiny:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
        return query, key, value
    from effattn.compiler.capture import capture
    from effattn.evaluate.rope import RopeScaling, context_of, scaled
    from effattn.models import load_smollm2, standard_library_text

    model, tokenizer = load_smollm2(dtype=torch.bfloat16, device=options.device)
    ids = standard_library_text(tokenizer, length).to(options.device)
    kept: list[tuple[Tensor, ...]] = []

    def receive(captured):
        if captured.number == LAYER:
            kept.append(tuple(tensor.clone() for tensor in (captured.query, captured.key, captured.value)))

    context = context_of(model) or length
    with scaled(model, RopeScaling("yarn", length / context) if length > context else None), torch.no_grad():
        capture(model.base_model, receive, ids, use_cache=False)
    query, key, value = kept[0]
    # neighbouring query heads stay with their key head
    groups = HEADS // KV_HEADS
    query = query.unflatten(1, (key.shape[1], -1))
    query = query[:, [i % query.shape[1] for i in range(KV_HEADS)]]
    query = query[:, :, [i % query.shape[2] for i in range(groups)]].flatten(1, 2)
    key, value = (tensor[:, [i % tensor.shape[1] for i in range(KV_HEADS)]] for tensor in (key, value))
    return query.contiguous(), key.contiguous(), value.contiguous()


def dense(backend: SDPBackend | None, given: Sequence[Tensor]) -> Callable[[], Tensor]:
    query, key, value = given
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))

    def call() -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return call


def plan_of(form: str, params: dict[str, Any], head_dim: int) -> Plan:
    chosen = effattn.forms()[form]
    position = q + Nk - Nq
    spec = AttentionSpec(head_dim**-0.5 * s, k <= position)
    site = called_site(spec, position, Layout(1, 32, 8, Nq, Nk, head_dim, head_dim))
    return Plan(form, spec, Sparsity(chosen.selector(chosen.params(**params), site)))


def density(listed: BlockList, heads: int, length: int) -> float:
    """Visited pairs of a block list over causal pairs: units on the edge count by half of their pairs."""
    count, partial = listed.kv_num_blocks.double(), listed.partial.double()
    whole = (count - partial / 2) * listed.unit
    return float(whole.mean()) * count.shape[2] * listed.block / (length * (length + 1) / 2)


def operators(suite: harness.Suite, options: argparse.Namespace, lengths: Sequence[int]) -> None:
    """Single attentions: dense, whole forms, and their selections alone."""
    on_gpu = options.device != "cpu"
    steps = triton_steps if on_gpu else portable_steps
    for length in lengths:
        given = inputs(options, length)
        query, key, value = given
        case = f"attention, N {length:,}"
        with torch.no_grad():
            for name, backend in ((CUDNN, SDPBackend.CUDNN_ATTENTION), (FLASH, SDPBackend.FLASH_ATTENTION)):
                row = suite.measure(case, name, partial(dense, backend if on_gpu else None, given), compare=some_rows)
                if row is not None and row.ms:
                    row.more[PER_DENSITY] = row.ms
            for name, (form, params) in (TINY_FORMS if options.tiny else FORMS).items():
                plan = plan_of(form, params, query.shape[3])
                choose = partial(select, plan, query, key, steps=steps)
                kept = density(choose(), query.shape[1], length)
                suite.measure(case, f"{name}, selection", lambda choose=choose: choose, compare=None)
                attend = partial(torch.ops.effattn.attend, query, key, value, [], [], [], plan.encode())
                row = suite.measure(
                    case,
                    name,
                    lambda attend=attend: attend,
                    compare=lambda value: some_rows(value[0]),
                    more={"density": kept},
                )
                if row is not None and row.ms:
                    row.more[PER_DENSITY] = row.ms / kept
        if length != lengths[-1]:
            continue  # the shorter the text, the more of it is kept: the bars are for the longest
        for name in BARRED:
            suite.bar(case, name, CUDNN, 1.15, PER_DENSITY)
        suite.bar(case, "proxy, one group, selection", CUDNN, 0.05)
        suite.bar(case, "proxy", FLASH, 1 / 10.3)


def models(suite: harness.Suite, options: argparse.Namespace, length: int) -> None:
    """A whole prefill at a density of a tenth, against the same model lossless."""
    model, ids = llama.model(options, length), llama.tokens(options, 1, length)
    # a constant budget of c keys a row keeps 2 b - b^2 of the causal pairs, b = c / N
    least = int(length * (1 - 0.9**0.5))
    proxy = {"gamma": 1e-6, "least": least} | ({"block": 32} if options.tiny else {})
    power = {"block": 32, "window": 64, "sinks": 32} if options.tiny else {"block": 128, "window": 2048, "sinks": 128}
    asked = {
        f"{EFFATTN}, proxy at 10 %": {"rule": [{"forms": ["proxy"], "params": {"proxy": proxy}}]},
        f"{EFFATTN}, power": {"rule": [{"forms": ["power"], "params": {"power": power}}]},
    }
    case = f"prefill of a model, N {length:,}"

    def build(**more: Any) -> Callable[[], Tensor]:
        function = suite.compiled(model, EFFATTN, **more)
        return lambda: function(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    with torch.no_grad():
        suite.measure(case, EFFATTN, build, compare=None)
        for name, policy in asked.items():
            suite.measure(case, name, partial(build, policy=policy), compare=None)
    suite.bar(case, f"{EFFATTN}, proxy at 10 %", EFFATTN, 1 / 2.4)
    suite.bar(case, f"{EFFATTN}, power", EFFATTN, 1 / 3.0)


def some_rows(out: Tensor) -> Tensor:
    return torch.cat([out[:, :, :256], out[:, :, ::61]], dim=2)


def run(argv: list[str] | None) -> int:
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of 32,768 and 131,072")
    parser.add_argument("--parts", nargs="+", choices=("attention", "model"), default=["attention", "model"])
    options = parser.parse_args(argv)
    lengths = options.lengths or (TINY_LENGTHS if options.tiny else LENGTHS)
    setting = {"heads": HEADS, "kv_heads": KV_HEADS, "captured from": "SmolLM2-135M-Instruct, layer 15"}
    suite = harness.Suite("selectors", options, setting, against=(CUDNN, FLASH, EFFATTN))
    if "attention" in options.parts:
        operators(suite, options, lengths)
    if "model" in options.parts:
        models(suite, options, max(lengths))
    return suite.finish()


if __name__ == "__main__":
    harness.main(run)
