"""Exact: the function that user code computes, whatever its mask and score; only the kernel changes."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from effattn.ir.expr import Nk
from effattn.ir.plan import Kernel
from effattn.lowering.forms.form import Form, Params


class ExactParams(Params):
    """Which kernel; the function is the same."""

    kernel: Kernel = Field(
        default="auto", description="where SDPA's kernels compute it: sdpa, generated, or the one that measured faster"
    )

    def shown(self) -> dict[str, Any]:
        """Only what was asked for: the function is the same whatever the kernel."""
        return self.model_dump(exclude_defaults=True)


def kernel_of(params: Params) -> Kernel:
    """Which kernel a form's parameters ask for."""
    return params.kernel if isinstance(params, ExactParams) else "auto"


def reference(_params, q_index, k_index):
    """Every key: bool [Nq, Nk]."""
    return torch.ones(torch.broadcast_shapes(q_index.shape, k_index.shape), dtype=torch.bool, device=q_index.device)


EXACT = Form(
    name="exact",
    kind="exact",
    summary="the same function, computed tile by tile: SDPA's kernels where they apply, else a generated one",
    source="Dao et al., FlashAttention-2, arXiv 2307.08691",
    params=ExactParams,
    rules=(),
    kept_keys=lambda params: Nk,
    reference=reference,
)
