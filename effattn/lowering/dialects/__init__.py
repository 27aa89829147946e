"""How terms are printed and kernels loaded: one folder per kernel language."""
