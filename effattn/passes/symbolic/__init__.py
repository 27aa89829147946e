"""Symbolic reading: a graph node as a function of its indices.

:class:`~effattn.passes.symbolic.reader.Reader` walks from a node towards the inputs. Each operation that it understands
has a small function here, registered under its name in the vocabulary; a node of any other operation stays as data
and appears in the expression as a named load.
"""

# they register their readers
from effattn.passes.symbolic import choices, creation, elementwise, functions, indexing, logic, parts, views  # noqa: F401
from effattn.passes.symbolic.reader import CaptureSource, Reader, Reading

__all__ = ["CaptureSource", "Reader", "Reading"]
