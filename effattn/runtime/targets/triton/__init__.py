"""The Triton target: a kernel generated per specialisation, on GPUs that Triton supports."""

import torch

from effattn import settings
from effattn.ir.plan import Plan
from effattn.ir.site import Site
from effattn.runtime import kernels
from effattn.runtime.launching import architecture, forget
from effattn.runtime.selection import triton_steps as steps
from effattn.runtime.targets.triton import linear
from effattn.runtime.targets.triton.backward import prepare_backward, run_backward, start_backward
from effattn.runtime.targets.triton.forward import CALLS, prepare, run, start
from effattn.runtime.targets.triton.limits import why_no_backward, why_not, why_not_on
from effattn.runtime.targets.triton.specialise import in_gluon, map_blocks, spec_of

alone = True


def describe(plan: Plan, site: Site) -> str:
    """Path of the generated source that runs a plan at a site. Writes the file if it does not exist."""
    sizes, dtype = site.layout, getattr(torch, site.dtype)
    widths = int(sizes.head_dim), int(sizes.value_dim)
    device = torch.device(site.device)
    spec = spec_of(plan.complete, dtype, site.hints.q_len, sizes.groups, *widths, device)
    fast = in_gluon(spec, architecture(device), settings.current().precise)
    return str(kernels.load(spec if fast is None else fast).path)


__all__ = [
    "CALLS",
    "alone",
    "describe",
    "forget",
    "linear",
    "map_blocks",
    "prepare",
    "prepare_backward",
    "run",
    "run_backward",
    "start",
    "start_backward",
    "steps",
    "why_no_backward",
    "why_not",
    "why_not_on",
]
