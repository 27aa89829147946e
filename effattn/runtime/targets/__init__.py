"""Targets, which run plans: generated Triton kernels, ATen in blocks, SDPA's kernels."""
