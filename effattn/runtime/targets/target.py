"""The protocol of a target: a module that runs plans and says which calls it does not support.

``TARGETS`` in :mod:`effattn.runtime.targets.choice` lists the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from effattn.ir.attention import AttentionSpec
from effattn.ir.plan import Plan
from effattn.ir.refusal import Refusal
from effattn.ir.site import Site

Gradients = tuple[Tensor, Tensor, Tensor, list[Tensor]]  # of query, key, value, and of captured tensors in order

Differentiated = tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]
"""What a gradient is computed from: grad_out, grad_lse, query, key, value, out, lse."""


class LinearTarget(Protocol):
    """Linear attention on one target. Arguments as in :mod:`effattn.runtime.targets.portable.linear`."""

    def why_not(self, dtype: torch.dtype, features: int, value_dim: int) -> Refusal | None:
        """Why it does not support such calls; None if it does."""

    def run(
        self,
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
    ) -> Tensor:
        """Fill ``out`` and return the state after the last token."""
        ...

    def run_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        out: Tensor,
        *,
        scale: float,
        causal: bool,
        ones: bool = False,
        eps: float = 0.0,
    ) -> Tensor:
        """The same for a few tokens after ``state``."""
        ...

    def describe(self, site: Site, causal: bool, decay: bool, normalised: bool) -> str:
        """What runs a site, for the report."""
        ...


class Target(Protocol):
    """A module that runs plans. :mod:`effattn.runtime.targets.portable` runs every plan on every device."""

    @property
    def alone(self) -> bool:
        """Whether SDPA's own kernels are not tried first when this target is named."""
        ...

    @property
    def steps(self) -> ModuleType:
        """The module that scores and picks keys at run time; see :func:`effattn.runtime.selection.run.select`."""
        ...

    @property
    def linear(self) -> LinearTarget: ...

    def why_not_on(self, device: str) -> Refusal | None:
        """Why it cannot run on a device type of this machine; None if it can."""

    def why_not(self, spec: AttentionSpec, dtype: torch.dtype, head_dim: int, value_dim: int) -> Refusal | None:
        """Why it does not support calls of this spec, dtype and these head dimensions; None if it does."""

    def why_no_backward(
        self, spec: AttentionSpec, head_dim: int, value_dim: int, wanted: tuple[str, ...] = ()
    ) -> Refusal | None:
        """Why it has no backward for them, so that the portable target's runs; None if it has one.

        ``wanted``: the captured tensors whose gradients are needed.
        """

    def run(
        self,
        plan: Plan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor] = (),
        scalars: Sequence[int] = (),
        numbers: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE, as ``effattn::attend`` defines them."""
        ...

    def run_backward(
        self,
        plan: Plan,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        captures: Sequence[Tensor] = (),
        scalars: Sequence[int] = (),
        numbers: Sequence[float] = (),
        wanted: Sequence[str] = (),
    ) -> Gradients:
        """Gradients, from what :meth:`run` returned as ``out`` and ``lse``; of the captured tensors those in
        ``wanted``."""
        ...

    def describe(self, plan: Plan, site: Site) -> str:
        """What runs a plan at a site, for the report: the path of its kernel, or a few words."""
        ...


@runtime_checkable
class PreparingTarget(Protocol):
    """A target that decides once what holds for many calls. One that does not have these has :meth:`Target.run`."""

    def map_blocks(
        self, plan: Plan, dtype: torch.dtype, groups: int, head_dim: int, value_dim: int, device: torch.device
    ) -> tuple[int, int] | None:
        """The sizes of the blocks of the block map that long calls visit; None if they visit none."""
        ...

    def prepare(
        self,
        plan: Plan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor],
        scalars: Sequence[int],
        numbers: Sequence[float],
    ) -> Any:
        """What is decided once for all calls of this plan with the same launch key, from the first of them."""
        ...

    def start(
        self,
        call: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor],
        scalars: Sequence[int],
        numbers: Sequence[float],
        known: Any,
        blocks: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Any]:
        """The same as :meth:`Target.run`, of a call that :meth:`prepare` returned.

        ``blocks``: what ``effattn::block_map`` makes, with blocks as ``plan.sparsity`` has them; None: it is made here.

        Returns:
            the result, and what to pass as ``known`` to later calls; it is None in the first.
        """
        ...

    def prepare_backward(
        self,
        plan: Plan,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        captures: Sequence[Tensor],
        scalars: Sequence[int],
        numbers: Sequence[float],
        wanted: Sequence[str],
    ) -> Any:
        """The same for gradients: what is decided once."""
        ...

    def start_backward(
        self,
        call: Any,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        captures: Sequence[Tensor],
        scalars: Sequence[int],
        numbers: Sequence[float],
        known: Any,
    ) -> tuple[Gradients, Any]:
        """The same as :meth:`Target.run_backward`, of a call that :meth:`prepare_backward` returned."""
        ...
