"""The ops that rewritten graphs call: torch.library definitions, fake kernels and gradients.

Importing this package, or any of its modules, registers all of them. Triton is not imported.
"""

from effattn.runtime.ops import (
    attend,
    block_lists,
    block_map,
    chosen_keys,
    decay_tables,
    first_keys,
    linear,
    mask_tables,
    window_hybrid,
)

__all__ = [
    "attend",
    "block_lists",
    "block_map",
    "chosen_keys",
    "decay_tables",
    "first_keys",
    "linear",
    "mask_tables",
    "window_hybrid",
]
