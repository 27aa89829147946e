"""Linear attention by generated Triton kernels: the parts of a sequence, and the kernel for a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from effattn.ir.refusal import Refusal, Why
from effattn.ir.site import Site
from effattn.lowering.dialects.triton.module import module_from
from effattn.lowering.dialects.triton.starting import multiprocessors
from effattn.lowering.kernels.linear.source import file_name, generate
from effattn.lowering.kernels.linear.spec import (
    MAX_FEATURES,
    MAX_VALUE_DIM,
    STEP_TOKENS,
    LinearKind,
    LinearSpec,
    LinearTiles,
)
from effattn.lowering.kernels.spec import DTYPES
from effattn.lowering.schedules import linear as linear_configs
from effattn.runtime.cache import keep_source
from effattn.runtime.launching import (
    Known,
    LaunchCache,
    architecture,
    narrow,
    on_device,
    tensor_key,
    tf32,
    too_narrow,
)

PROGRAMS = 4  # per multiprocessor; with 8, parts are shorter and 32,768 tokens took 1.1 times as long on an H100
LEAST_SPAN = 1024  # least tokens of a part; reading and writing its state costs as much as 256 tokens


@dataclass(frozen=True)
class LinearKernel:
    """Generated kernels: their source, the path of its copy on disk, and the module with ``launch``."""

    spec: LinearSpec
    source: str
    path: Path
    module: ModuleType


@lru_cache(maxsize=1024)
def load(spec: LinearSpec) -> LinearKernel:
    """The kernels of ``spec``, generated once per process."""
    source = generate(spec)
    path = keep_source(file_name(spec, source), source)
    return LinearKernel(spec, source, path, module_from(source, path))


@dataclass(frozen=True)
class _Call:
    """The common part of calls with the same shapes, strides, dtypes and alignment."""

    launch: Callable[..., Known]
    span: int
    parts: int
    states: tuple[int, ...]  # shape of the workspace
    known: Known | None = None


_CALLS = LaunchCache()


def forget() -> None:
    """Clear the launch cache."""
    _CALLS.clear()


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    out: Tensor,
    *,
    scale: float,
    causal: bool,
    ones: bool = False,
    eps: float = 0.0,
    reverse: bool = False,
    tiles: LinearTiles | None = None,
    span: int | None = None,
) -> Tensor:
    """See :func:`effattn.runtime.targets.portable.linear.run`.

    ``tiles`` and ``span`` override the choice, for measurements.
    """
    kind: LinearKind = "chunks" if causal else "whole"
    traits = (causal and reverse, ones, tiles, span)
    return _run(kind, traits, query, key, value, log_decay, state, out, scale, eps)


def run_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    out: Tensor,
    *,
    scale: float,
    causal: bool = True,
    ones: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """A few tokens after ``state``, in float32; arguments as in :func:`run`."""
    kind: LinearKind = "step" if query.shape[2] <= STEP_TOKENS else "chunks"
    return _run(kind, (False, ones, None, None), query, key, value, log_decay, state, out, scale, eps)


def _run(
    kind: LinearKind,
    traits: tuple[bool, bool, LinearTiles | None, int | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    out: Tensor,
    scale: float,
    eps: float,
) -> Tensor:
    heads = max(query.shape[1], key.shape[1])
    shape = (query.shape[0], heads, query.shape[3], value.shape[3] + traits[1])
    final = query.new_empty(shape, dtype=torch.float32)
    if key.shape[2] == 0 or out.numel() == 0:
        return final.zero_() if state is None else final.copy_(state)
    if too_narrow(query):
        query, key, value = query.float(), key.float(), value.float()
    query, key, value = narrow(query), narrow(key), narrow(value)
    log_decay = None if log_decay is None else log_decay.float().contiguous()
    state = None if state is None else state.contiguous()
    given = [tensor for tensor in (log_decay, state) if tensor is not None]
    launch_key = (
        kind,
        traits,
        log_decay is None,
        state is None,
        tf32(),
        *map(tensor_key, (query, key, value, out, *given)),
    )

    def started(call: _Call) -> tuple[Tensor, Known]:
        states = query.new_empty(call.states, dtype=torch.float32)
        tensors, sizes = (query, key, value, log_decay, state, out, states, final), (call.span, call.parts)
        with on_device(query.device):
            return final, call.launch(*tensors, *sizes, scale, eps, call.known)

    prepared = partial(_prepared, kind, traits, query, key, value, log_decay is not None, state is not None)
    return _CALLS.run(launch_key, prepared, started)


def _prepared(
    kind: LinearKind,
    traits: tuple[bool, bool, LinearTiles | None, int | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: bool,
    has_state: bool,
) -> _Call:
    """Choose kernel and parts for a call."""
    reverse, ones, tiles, span = traits
    heads = max(query.shape[1], key.shape[1])
    groups = (heads // query.shape[1], heads // key.shape[1])
    widths, device = (query.shape[3], value.shape[3]), query.device
    spec = specialise(kind, query.dtype, *widths, *groups, decay, has_state, ones, reverse, device, tiles)
    programs = query.shape[0] * heads * spec.value_tiles
    span = span or span_for(programs, key.shape[2], spec.tiles.chunk, multiprocessors(device))
    parts = -(-key.shape[2] // span)
    parts = parts - 1 if kind == "chunks" else parts
    pairs = query.shape[0] * (key.shape[1] if spec.shared else heads)
    states = (0,) if kind == "step" else (pairs, parts, widths[0], spec.width)
    return _Call(load(spec).module.launch, span, parts, states)


def specialise(
    kind: LinearKind,
    dtype: torch.dtype,
    features: int,
    value_dim: int,
    query_groups: int,
    key_groups: int,
    decay: bool,
    has_state: bool,
    ones: bool,
    reverse: bool,
    device: torch.device,
    tiles: LinearTiles | None = None,
) -> LinearSpec:
    """The specialisation for such calls on ``device``."""
    name = str(dtype).removeprefix("torch.")
    bits = 32 if name == "float32" else 16
    tiles = tiles or linear_configs.choose(kind, architecture(device), bits, features, value_dim, ones)
    shared = key_groups > 1 and not decay and (kind == "whole" or (kind == "chunks" and not has_state))
    rounded = tf32() and bits == 32
    return LinearSpec(
        kind, name, features, value_dim, tiles, query_groups, key_groups, shared, decay, ones, reverse, rounded
    )


def span_for(programs: int, length: int, chunk: int, multiprocessors: int) -> int:
    """Tokens per part, a multiple of ``chunk``, so that parts keep all multiprocessors busy. Depends on sizes only.

    ``programs``: number of programs per part.
    """
    parts = -(-PROGRAMS * multiprocessors // max(1, programs))
    parts = max(1, min(parts, -(-length // LEAST_SPAN)))
    return -(-max(1, length) // (parts * chunk)) * chunk


def why_not(dtype: torch.dtype, features: int, value_dim: int) -> Refusal | None:
    """Why kernels do not support such calls; None if they do."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        return Refusal(Why.DTYPE, f"kernels of linear attention exist for {', '.join(DTYPES)}, not {name}")
    most = MAX_FEATURES[DTYPES[name]]
    if features > most or value_dim > MAX_VALUE_DIM:
        reason = f"kernels of linear attention take up to {most} features and {MAX_VALUE_DIM} value columns in {name}"
        return Refusal(Why.HEAD_DIM, reason)
    return None


def describe(site: Site, causal: bool, decay: bool, normalised: bool) -> str:
    """Path of the generated source that runs a site. Writes the file if it does not exist."""
    dtype, sizes, device = getattr(torch, site.dtype), site.layout, torch.device(site.device)
    widths = int(sizes.head_dim), int(sizes.value_dim)
    kind: LinearKind = "chunks" if causal else "whole"
    spec = specialise(kind, dtype, *widths, 1, sizes.groups, decay, False, normalised, False, device)
    return str(load(spec).path)
