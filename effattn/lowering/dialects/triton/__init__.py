"""Triton: terms as source, device functions, and loading of generated modules."""
