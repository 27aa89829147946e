"""Reads a graph node as a function of its indices.

:class:`~effattn.passes.symbolic.reader.Reader` descends from a node towards the inputs. Each operation that it knows
has a function here, registered under its name in the vocabulary. A node of any other operation becomes a captured
tensor, a named load in the expression.
"""

# imported to register their readers
from effattn.passes.symbolic import choices, creation, elementwise, functions, indexing, logic, parts, views  # noqa: F401
from effattn.passes.symbolic.reader import CaptureSource, Reader, Reading

__all__ = ["CaptureSource", "Reader", "Reading"]
