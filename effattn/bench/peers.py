"""What computes a problem: effattn and its peers, each with the reason why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from effattn.bench.problem import BenchError, Mod, Problem, allowed
from effattn.lowering.device import device_type

MOST_MASK = 1 << 31  # bytes of a mask with a value for each pair
MOST_SCORES = 1 << 32  # bytes of all scores in float32
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Given:
    """A problem and what its mask and score are in this run."""

    problem: Problem
    mask: Mod | None
    score: Mod | None
    backward: bool
    options: Mapping[str, int] = field(default_factory=dict)  # of the peer's kernels; empty: it chooses

    @property
    def on_gpu(self) -> bool:
        return device_type(torch.device(self.problem.device).type).kernels == "compiled"

    @property
    def learned(self) -> tuple[Tensor, ...]:
        return () if self.score is None else self.score.learned


@dataclass(frozen=True)
class Peer:
    """A way to compute attention."""

    name: str
    why_not: Callable[[Given], str | None]
    make: Callable[[Given], Run]  # what it needs besides query, key and value is made here, and is not timed
    fallbacks: tuple[Mapping[str, int], ...] = ()  # options to try one after another where its own choice fails
    same: bool = True  # False: it computes causal attention without the rest of the mask and score, as a yardstick


# --- effattn ---


def _effattn(given: Given) -> Run:
    import effattn
    from effattn.compiler.backend import effattn as backend

    if given.problem.form is not None and given.score is None:
        name, params = given.problem.form
        return lambda q, k, v: effattn.attention(q, k, v, form=name, **params)
    # FlexAttention cannot be traced for a gradient on a CPU
    written = _written_out(given) if given.backward and not given.on_gpu else _flex_call(given)
    options: Any = {"strict": True} if given.on_gpu else {"strict": True, "inner_backend": "eager"}
    return _Replaced(torch.compile(written, backend=backend, options=options, dynamic=False))


class _Replaced:
    """A compiled function whose attention has been replaced: the time of one that is left alone would mislead."""

    def __init__(self, compiled: Run):
        self.compiled, self.looked_at = compiled, False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.looked_at:
            return self.compiled(q, k, v)
        from effattn.compiler.report.collect import listening

        with listening() as heard:
            out = self.compiled(q, k, v)
        reasons = [missed.reason for graph in heard.graphs for missed in graph.missed]
        reasons += [site.reason for graph in heard.graphs for site in graph.sites if not site.replaced]
        if reasons or not any(graph.sites for graph in heard.graphs):
            raise BenchError(f"left alone: {'; '.join(reasons) or 'no attention was found'}")
        self.looked_at = True
        return out


def _flex_call(given: Given) -> Run:
    """A user's function with FlexAttention, block mask and all."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    problem, mask = given.problem, given.mask
    score = None if given.score is None else given.score.function

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = None
        if mask is not None:
            size = (*_batch_and_heads(problem, mask), problem.tokens, problem.tokens)
            blocks = create_block_mask(mask.function, *size, device=q.device)
        return flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=problem.groups > 1)

    return attention


def _written_out(given: Given) -> Run:
    """The same as two products and a softmax."""
    problem = given.problem

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, rows, keys = _indices(problem)
        k, v = (x.repeat_interleave(problem.groups, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).float() * problem.head_dim**-0.5
        if given.score is not None:
            scores = given.score.function(scores, b, h, rows, keys)
        if given.mask is not None:
            scores = scores.masked_fill(~given.mask.function(b, h, rows, keys), float("-inf"))
        return torch._safe_softmax(scores, -1).to(v.dtype) @ v  # a query without keys gives 0

    return attention


def _indices(problem: Problem) -> tuple[Tensor, ...]:
    sizes = (problem.batch, problem.heads, problem.tokens, problem.tokens)
    shapes = ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,))
    return tuple(torch.arange(n, device=problem.device).view(shape) for n, shape in zip(sizes, shapes, strict=True))


def _batch_and_heads(problem: Problem, mask: Mod) -> tuple[int | None, int | None]:
    return problem.batch if mask.by_batch else None, problem.heads if mask.by_head else None


# --- peers ---


def _flex(given: Given) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    problem, blocks = given.problem, None
    if given.mask is not None:
        size = (*_batch_and_heads(problem, given.mask), problem.tokens, problem.tokens)
        blocks = create_block_mask(given.mask.function, *size, device=problem.device, _compile=True)
    score = None if given.score is None else given.score.function
    call = torch.compile(flex_attention, dynamic=False)
    options: Any = dict(given.options) or None
    more = {"score_mod": score, "block_mask": blocks, "enable_gqa": problem.groups > 1, "kernel_options": options}
    return lambda q, k, v: call(q, k, v, **more)


# smaller tiles of the backward's kernels, which may need more shared memory than there is
_SMALLER = {"BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32, "num_stages": 1}
_SMALLEST = {"BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32, "num_stages": 1}


def _no_flex(given: Given) -> str | None:
    return None if given.on_gpu else "is compiled for GPUs"


def _sdpa(backend: SDPBackend | None, causal: bool | None) -> Callable[[Given], Run]:
    """SDPA with ``is_causal``; None: as the problem is."""

    def make(given: Given) -> Run:
        hidden = given.problem.causal if causal is None else causal

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=bool(hidden), enable_gqa=given.problem.groups > 1)

        if backend is None:
            return run

        def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return run(q, k, v)

        return forced

    return make


def _plain(given: Given) -> str | None:
    """Why the problem is more than SDPA with ``is_causal``."""
    if given.score is not None:
        return "computes no such score"
    return None if given.problem.causal is not None else "computes no such mask without a value for each pair"


def _no_gpu_kernel(given: Given) -> str | None:
    if not given.on_gpu:
        return "exists on GPUs only"
    return "computes half precision only" if given.problem.dtype == "float32" else None


def _only_plain_on_gpu(given: Given) -> str | None:
    return _no_gpu_kernel(given) or _plain(given)


def _only_as_yardstick(given: Given) -> str | None:
    if _plain(given) is None:
        return "is not needed: the problem itself is plain"
    return _no_gpu_kernel(given)


def _sdpa_with_mask(given: Given) -> Run:
    if _plain(given) is None:
        return _sdpa(None, None)(given)
    problem, mask = given.problem, given.mask
    assert mask is not None
    batches, heads = (size or 1 for size in _batch_and_heads(problem, mask))
    rows = torch.arange(problem.tokens, device=problem.device)
    table = torch.stack(
        [torch.stack([allowed(problem, mask, rows, b, h) for h in range(heads)]) for b in range(batches)]
    )
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=table, enable_gqa=problem.groups > 1)


def _no_sdpa_with_mask(given: Given) -> str | None:
    if given.score is not None:
        return "computes no such score"
    if _plain(given) is None or given.mask is None:
        return "is measured by its kernels" if given.on_gpu and given.problem.dtype != "float32" else None
    batches, heads = (size or 1 for size in _batch_and_heads(given.problem, given.mask))
    size = batches * heads * given.problem.tokens**2
    return None if size <= MOST_MASK else f"needs a mask of {size / 2**30:.0f} GiB"


def _no_eager(given: Given) -> str | None:
    size = 4 * given.problem.batch * given.problem.heads * given.problem.tokens**2
    return None if size <= MOST_SCORES else f"needs scores of {size / 2**30:.0f} GiB"


FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
EFFATTN = "effattn"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(EFFATTN, lambda given: None, _effattn),
        Peer("FlexAttention", _no_flex, _flex, (_SMALLER, _SMALLEST)),
        Peer("SDPA flash", _only_plain_on_gpu, _sdpa(FLASH, None)),
        Peer("SDPA cuDNN", _only_plain_on_gpu, _sdpa(CUDNN, None)),
        Peer("SDPA", _no_sdpa_with_mask, _sdpa_with_mask),
        Peer("eager", _no_eager, _written_out),
        Peer("SDPA cuDNN, plain causal", _only_as_yardstick, _sdpa(CUDNN, True), same=False),
    )
}
