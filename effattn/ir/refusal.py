"""Why an attention was left alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Why(StrEnum):
    """The rule that refused an attention, a form or a target. Code and tests compare these; sentences may change."""

    NOT_ATTENTION = "not attention"  # a softmax of something else: a router, a classifier
    # in place of the softmax
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
    NOT_APART = "heads apart"  # batch and heads are merged into one dimension and cannot be told apart
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
    UNEXPECTED = "error"  # not a property of the attention: a bug in effattn, a missing file
    # attention without a softmax
    LOOP_OVER_BLOCKS = "loop over blocks"
    BLOCKS = "blocks"
    MASKED_WEIGHTS = "masked weights"
    BOTH_DIRECTIONS = "both directions"
    DECAY = "decay"
    GRADIENT_OF_DECAY = "gradient of decay"
    SCALE = "scale"
    # what a form asks of a site
    CAUSAL = "causal"
    DATA_MASK = "no data mask"
    DATA_BY_HEAD = "the same data for all heads"
    SINKS_ON_PADDING = "sinks on padding"
    ONLY_CAUSAL = "only causal"
    PLAIN_SCORE = "plain score"
    PREFILL = "prefill"
    SAME_MASK = "same mask for heads"
    GROUPS = "groups"
    BOUNDARIES = "boundaries"
    PREDICTOR = "weights of the predictor"
    MAP_WEIGHTS = "weights of the map"
    NOT_ACCEPTED = "weights or tolerance"
    TRAINED_MAP = "trained map"
    LAYER = "layer"
    CAUSAL_WINDOW = "causal window"
    PLAIN_WINDOW = "plain score in the window"
    WHOLE = "every key up to the query"
    CHOSEN_BY_DATA = "chosen by data"  # kept keys cannot be counted without query and key
    SHORT = "shorter than min_length"  # the policy wants the form only for more keys
    SEVERAL_LENGTHS = "min_length"  # an op other than effattn::attend cannot depend on the length
    # what a target does not serve
    NO_TRITON = "no triton"
    EXPRESSION = "expression"


@dataclass(frozen=True)
class Refusal:
    """Why something was not done: the rule, the reason, what would help, and the line of user code."""

    rule: Why
    reason: str
    hint: str = ""
    cause: str = ""  # "file:line: code" of the operation named in the reason

    def __str__(self) -> str:
        return f"{self.reason} ({self.hint})" if self.hint else self.reason
