"""What a target is: a module that computes plans, and says beforehand which it does not. ``TARGETS`` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from effattn.ir.attention import AttentionSpec
from effattn.ir.plan import Plan
from effattn.ir.refusal import Refusal
from effattn.ir.site import Site


class LinearTarget(Protocol):
    """Attention without a softmax on one target; arguments as in :mod:`effattn.runtime.targets.portable.linear`."""

    def why_not(self, dtype: torch.dtype, features: int, value_dim: int) -> Refusal | None:
        """Why it does not serve such calls; None if it does."""

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
        """What runs such a site, for the report."""
        ...


class Target(Protocol):
    """A module that computes plans; :mod:`effattn.runtime.targets.portable` computes every one on every device."""

    @property
    def alone(self) -> bool:
        """Whether whoever names this target means it alone, so that SDPA's own kernels do not go before it."""
        ...

    @property
    def steps(self) -> ModuleType:
        """What scores and picks where keys are chosen at run time, as :mod:`effattn.runtime.selection.run` needs it."""
        ...

    @property
    def linear(self) -> LinearTarget: ...

    def why_not_on(self, device: str) -> Refusal | None:
        """Why it cannot run on devices of a type, as torch calls it, on this machine; None if it can."""

    def why_not(self, spec: AttentionSpec, dtype: torch.dtype, head_dim: int, value_dim: int) -> Refusal | None:
        """Why it does not serve calls of such a spec, dtype and such sizes; None if it does."""

    def why_no_backward(self, spec: AttentionSpec, head_dim: int, value_dim: int) -> Refusal | None:
        """Why it has no gradient for them; None if it has. The portable target's is taken then."""

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; ``out`` and ``lse`` are what :meth:`run` returned."""
        ...

    def describe(self, plan: Plan, site: Site) -> str:
        """What runs a plan at a site, for the report: the file of its kernel, or a few words."""
        ...
