"""Any form of attention as a plain function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.errors import FormRefused, OptionError
from effattn.ir import expr
from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.plan import Dispatch, Plan, Sparsity
from effattn.ir.refusal import Refusal, Why
from effattn.ir.selector import BOUNDARIES
from effattn.ir.site import Layout, called_site
from effattn.lowering.forms import FORMS, Form
from effattn.lowering.forms.exact import kernel_of
from effattn.lowering.forms.feature_maps import FEATURE_MAPS
from effattn.lowering.forms.form import CAUSAL
from effattn.lowering.forms.linear import CAUSAL_WINDOW
from effattn.policy.fields import params_of
from effattn.policy.problems import spelled, unknown
from effattn.runtime.ops.attend import attend
from effattn.runtime.ops.autograd import reaches_kernels
from effattn.runtime.ops.feature_attention import feature_attention

SCALE = expr.number("scale")
BATCH = expr.scalar("batch")  # plans hold for any batch size
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = map(expr.scalar, ("heads", "kv_heads", "head_dim", "value_dim"))


MOST_KEPT = 4096


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose results are kept by its arguments. It runs in every call if one of them cannot be hashed."""
    results: dict[Any, Any] = {}

    @wraps(function)
    def keeping(*args: Any) -> Any:
        key = args, repr(args)  # 1, 1.0 and True are equal, but a parameter may allow only one of them
        try:
            return results[key]
        except KeyError:
            if len(results) >= MOST_KEPT:
                results.clear()
            return results.setdefault(key, function(*args))
        except TypeError:
            return function(*args)

    return keeping


def forms() -> dict[str, Form]:
    """All forms by name."""
    return dict(FORMS)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: str = "power",
    causal: bool = True,
    scale: float | None = None,
    boundaries: Tensor | None = None,
    **params: Any,
) -> Tensor:
    """Attention in one of the forms, on any device. Works under torch.compile; differentiable if the form is.

    Args:
        q: [B, Hq, Nq, D], floating point, any strides.
        k: [B, Hkv, Nk, D], of the same dtype and device; Hq is a multiple of Hkv (grouped heads).
        v: [B, Hkv, Nk, Dv].
        form: a name in :func:`forms`.
        causal: query i attends to keys up to i + Nk - Nq, so the last query sees all keys. With Nq > Nk the first
            queries see none, and give zero.
        scale: factor on q . k. Default: 1 / sqrt(D); 1 for a form without a softmax. Feature maps beside a softmax
            window are applied to q without it.
        boundaries: bool [B, Nk], True where a chunk of keys begins, for ``form="dhsa", unit=1, chunks="given"``.
        params: parameters of the form, as in a policy (``block=128, window=2048, sinks=128``).

    Returns:
        [B, Hq, Nq, Dv] in q's dtype.

    Raises:
        OptionError: unknown form or parameter, or an invalid value.
        FormRefused: the form does not apply here.
        ValueError: shapes, dtypes or devices do not match.
    """
    _check(q, k, v)
    if form in FORMS and not FORMS[form].softmax:
        return _without_softmax(q, k, v, form, causal, scale, params)
    # a compiled graph serves any sizes, so its plan must too; in eager mode a form may use the number of heads
    sizes = None if torch.compiler.is_compiling() else (*q.shape[1::2], k.shape[1], v.shape[3])
    plan = _plan(form, bool(causal), tuple(params.items()), boundaries is not None, sizes)
    factor = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    captures = [] if boundaries is None else [_checked_boundaries(boundaries, k)]
    direct = not torch.compiler.is_compiling() and reaches_kernels(q, k, v, *captures)
    run = attend if direct else torch.ops.effattn.attend.default
    return run(q, k, v, captures, [], [factor], plan)[0]


def _without_softmax(
    q: Tensor, k: Tensor, v: Tensor, form: str, causal: bool, scale: float | None, params: dict[str, Any]
) -> Tensor:
    """Attention with a feature map without weights; ``scale`` multiplies q before its map."""
    feature_map, eps, *window = _map_of(form, tuple(params.items()), bool(causal))
    if window:
        size, terraced, gamma = window
        return feature_attention(q, k, v, feature_map, window=size, terraced=terraced, gamma=gamma, scale=scale)
    return feature_attention(q if scale is None else q * scale, k, v, feature_map, causal=bool(causal), eps=eps)


@torch.compiler.assume_constant_result
@_kept
def _map_of(form: str, params: tuple[tuple[str, Any], ...], causal: bool) -> tuple[Any, ...]:
    """(feature map, eps), and with a window also (window, terraced, gamma)."""
    checked = _checked(form, params)
    if FEATURE_MAPS[checked.feature_map].trained:
        reason = f"the map {checked.feature_map!r} needs weights"
        hint = "call effattn.runtime.ops.feature_attention.feature_attention with them, or use a policy"
        raise FormRefused.because(f"attention(form={form!r}): ", Refusal(Why.TRAINED_MAP, reason, hint))
    if not checked.window:
        return checked.feature_map, checked.eps
    if not causal:
        raise FormRefused.because(f"attention(form={form!r}, causal=False): ", CAUSAL_WINDOW.because())
    return checked.feature_map, checked.eps, checked.window, checked.terraced, checked.gamma


def _checked(form: str, params: tuple[tuple[str, Any], ...]) -> Any:
    """The validated parameters of a form. Raises OptionError for unknown names and invalid values."""
    checked, problems = params_of(form, dict(params))
    if problems or checked is None:
        text = "; ".join(f"{spelled(path[1:])}: {problem}" if path[1:] else problem for path, problem in problems)
        raise OptionError(f"attention(form={form!r}): {text}")
    return checked


@torch.compiler.assume_constant_result
def _plan(
    form: str, causal: bool, params: tuple[tuple[str, Any], ...], cut: bool, sizes: tuple[int, ...] | None = None
) -> str:
    """The encoded plan of a form, kept for later calls unless it depends on a file.

    ``cut``: boundaries are given. ``sizes``: (query heads, head_dim, key heads, value_dim), or None for any.
    """
    files = FORMS[form].params.files if form in FORMS else ()
    write = _written if any(name in files for name, _ in params) else _kept_plan
    return write(form, causal, params, cut, sizes)


def _written(
    form: str, causal: bool, params: tuple[tuple[str, Any], ...], cut: bool, sizes: tuple[int, ...] | None
) -> str:
    if form not in FORMS:
        raise OptionError(f"attention: {unknown('form', str(form), FORMS)}")
    checked = _checked(form, params)
    position = expr.q + expr.Nk - expr.Nq
    spec = AttentionSpec(
        score=SCALE * expr.s,
        predicate=expr.k <= position if causal else sympy.true,
        captures=(CaptureSpec(BOUNDARIES, "bool", 2),) if cut else (),
        numbers=(SCALE.name,),
    )
    heads, head_dim, kv_heads, value_dim = sizes or (HEADS, HEAD_DIM, KV_HEADS, VALUE_DIM)
    layout = Layout(BATCH, heads, kv_heads, expr.Nq, expr.Nk, head_dim, value_dim)
    site = called_site(spec, position if causal else None, layout)
    selector = FORMS[form].selector(checked, site)
    wanted = selector is not None and selector.needs_boundaries
    if wanted != cut:
        needs = "needs boundaries, bool [B, Nk]" if wanted else 'takes no boundaries: they belong to chunks="given"'
        raise OptionError(f"attention(form={form!r}) {needs}")
    if CAUSAL in FORMS[form].rules and (refusal := CAUSAL.refusal(site, checked)) is not None:
        raise FormRefused.because(f"attention(form={form!r}, causal=False): ", refusal)
    spec = replace(spec, keep=FORMS[form].keep(checked, site))
    return Plan(form, spec, Sparsity(selector), Dispatch(kernel=kernel_of(checked))).encode()


_kept_plan = _kept(_written)


def _checked_boundaries(boundaries: Tensor, k: Tensor) -> Tensor:
    if boundaries.dtype != torch.bool or boundaries.shape != (k.shape[0], k.shape[2]) or boundaries.device != k.device:
        raise ValueError(
            f"attention: boundaries must be bool [{k.shape[0]}, {k.shape[2]}] on {k.device}, got {boundaries.dtype} "
            f"{tuple(boundaries.shape)} on {boundaries.device}"
        )
    return boundaries


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    dtype, device = q.dtype, q.device
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"attention: {name} must be [batch, heads, length, head_dim], not {tuple(tensor.shape)}")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"attention: q is {dtype} on {device}, {name} is {tensor.dtype} on {tensor.device}")
    if not dtype.is_floating_point:
        raise ValueError(f"attention: q must be floating point, got {dtype}")
    batch, heads, _, head_dim = q.shape
    k_batch, kv_heads, k_len, k_head_dim = k.shape
    v_batch, v_heads, v_len, _ = v.shape
    if k_batch != v_batch or kv_heads != v_heads or k_len != v_len:
        raise ValueError(f"attention: k {tuple(k.shape)} and v {tuple(v.shape)} must agree in batch, heads and length")
    if batch != k_batch or head_dim != k_head_dim:
        raise ValueError(f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head_dim")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {kv_heads} key/value heads")
