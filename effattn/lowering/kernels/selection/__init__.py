"""Kernels that find the keys to visit: scores, and the best of them."""
