"""Before matching: calls that hide a whole attention in one node are written out.

Everything else is left as the author wrote it: the vocabulary already gives every spelling one name.
"""

from __future__ import annotations

from torch import fx


def normalize(gm: fx.GraphModule) -> None:
    """Expand compound calls in place."""
