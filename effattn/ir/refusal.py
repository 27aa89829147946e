"""Why something was not done."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Why(StrEnum):
    """The rule that an attention fails which is left alone. Sentences may change; control flow and tests read this."""

    NOT_ATTENTION = "not attention"  # a softmax over something else: a router, a classifier
    # what stands where attention has a softmax
    NO_SOFTMAX = "no softmax"
    RANDOM = "random weights"
    NORMALISER = "normaliser"
    CHOSEN_KEYS = "chosen keys"
    AXIS = "softmax axis"
    # between query, key and softmax
    NO_PRODUCT = "no product"
    PAIRWISE = "pairwise scores"
    PRODUCT = "product"
    SEVERAL_PRODUCTS = "several products"
    TALKING_HEADS = "talking heads"
    READING = "reading"
    SCORE_AND_MASK = "score and mask"
    NO_MASK = "no mask"
    EMPTY_MASK = "empty mask"
    BLOCK_MASK = "block mask"
    MOD = "score_mod or mask_mod"
    ROWS_WITHOUT_KEYS = "rows without keys"
    SIZE = "size"
    SINK = "sink"
    # between softmax and the result
    WEIGHTS = "weights"
    DROPOUT = "dropout"
    VALUE = "value"
    OUTPUT = "output"
    OUTPUT_LAYOUT = "output layout"
    RESULT = "result"
    # the operands
    ARGUMENTS = "arguments"
    OPERANDS = "operands"
    NOT_APART = "heads apart"  # batch and heads are one dimension, and nothing tells which is which
    BATCH = "batch"
    HEADS = "heads"
    HEAD_DIM = "head_dim"
    LENGTHS = "lengths"
    SHAPES = "shapes"
    SIZES = "sizes"
    EMPTY = "empty"
    SYMBOLIC_LENGTH = "symbolic length"
    SYMBOLIC_NUMBER = "symbolic number"
    DTYPE = "dtype"
    DEVICE = "device"
    SUBCLASS = "subclass"
    # what else the code does
    GRADIENT = "gradient"
    MEMORY = "memory"
    TORCH_FUNC = "torch.func"
    HIGHER_ORDER = "higher order"
    OPERATOR = "operator"
    MULTI_HEAD_ATTENTION = "multi_head_attention"
    FUSED_CALL = "fused call"
    UNEXPECTED = "error"  # no property of the attention: a mistake of ours, a file that is not there
    # attention without a softmax
    LOOP_OVER_BLOCKS = "loop over blocks"
    BLOCKS = "blocks"
    MASKED_WEIGHTS = "masked weights"
    BOTH_DIRECTIONS = "both directions"
    DECAY = "decay"
    GRADIENT_OF_DECAY = "gradient of decay"
    SCALE = "scale"


@dataclass(frozen=True)
class Refusal:
    """Why something was not done: which rule, about what, what would help, and where it stands in the user's code."""

    rule: str
    reason: str
    hint: str = ""
    cause: str = ""  # "file:line: code" of the operation that the reason names

    def __str__(self) -> str:
        return f"{self.reason} ({self.hint})" if self.hint else self.reason
