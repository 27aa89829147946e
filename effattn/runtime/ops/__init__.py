"""What rewritten graphs call: torch.library ops, their fake kernels and gradients.

Importing this package, or any module of it, registers all of them; Triton is not imported.
"""

from effattn.runtime.ops import attend, block_lists, decay_tables, linear, mask_tables, window_hybrid

__all__ = ["attend", "block_lists", "decay_tables", "linear", "mask_tables", "window_hybrid"]
