"""The anchors, in the order in which they are tried. To add one, add a file here and a line in ``ANCHORS``."""

from effattn.passes.match.anchors.anchor import Anchor
from effattn.passes.match.anchors.flex import FLEX
from effattn.passes.match.anchors.linear import LINEAR
from effattn.passes.match.anchors.loop import LOOP
from effattn.passes.match.anchors.manual_softmax import MANUAL_SOFTMAX
from effattn.passes.match.anchors.sdpa import SDPA
from effattn.passes.match.anchors.softmax import SOFTMAX

ANCHORS: tuple[Anchor, ...] = (SDPA, FLEX, SOFTMAX, MANUAL_SOFTMAX, LOOP, LINEAR)
