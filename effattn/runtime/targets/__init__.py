"""What runs a plan: generated kernels, ATen in blocks, SDPA's own kernels."""
