"""Triton source for a plan: one self-contained file per specialisation.

``spec`` says what a kernel is specialised on, ``range_source`` prints tile ranges as scalar code, ``source`` fills the
templates beside it, ``offline`` compiles the result without a GPU.
"""
