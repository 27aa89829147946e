"""Triton source for a plan: one self-contained file per specialisation.

``spec`` says what a kernel is specialised on, ``configs`` which tile sizes it gets, ``algebra`` turns expressions into
source text, ``ranges`` tile ranges as scalar code, ``source`` fills the templates beside it, ``offline``
compiles the result for a GPU that need not be there.
"""
