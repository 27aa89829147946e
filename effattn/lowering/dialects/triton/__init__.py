"""Triton: terms as source, functions on the device, modules, compilation without a GPU."""
