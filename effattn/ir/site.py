"""The site: one attention found in a graph, with everything that later stages need to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from effattn.ir.attention import AttentionSpec
from effattn.ir.linear import LinearSpec

Stage = Literal["prefill", "decode", "train", "cross", "encoder"]
STAGES: tuple[Stage, ...] = ("prefill", "decode", "train", "cross", "encoder")


class Op(StrEnum):
    """The kinds of function that a site computes."""

    SOFTMAX = "softmax"
    LINEAR = "linear"


@dataclass(frozen=True)
class Layout:
    """Sizes of one attention, each an int or a sympy expression in the graph's symbolic lengths."""

    batch: Any
    heads: Any
    kv_heads: Any
    q_len: Any
    k_len: Any
    head_dim: Any
    value_dim: Any

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return int(self.heads) // int(self.kv_heads)

    @property
    def fixed_keys(self) -> int | None:
        """The number of keys if it is static, else None."""
        known = getattr(self.k_len, "is_Integer", isinstance(self.k_len, int))
        return int(self.k_len) if known else None

    def __str__(self) -> str:
        return (
            f"B {self.batch}, heads {self.heads}/{self.kv_heads}, N {self.q_len} x {self.k_len}, "
            f"D {self.head_dim}" + (f"/{self.value_dim}" if self.value_dim != self.head_dim else "")
        )


@dataclass(frozen=True)
class Site:
    """One attention: where it stands, its sizes, and the function it computes."""

    name: str
    found_as: str  # "softmax", "sdpa", "flex_attention", "multi_head_attention", "linear"
    stage: Stage
    layout: Layout
    hints: Layout  # the same sizes as ints, for cost estimates
    spec: AttentionSpec  # what user code computes: every key the mask allows
    position: Any | None  # absolute position of query q among the keys, from the causal condition; None: not causal
    dtype: str  # of query, key and value: "float32", "bfloat16", "float16"
    device: str  # device type, as in torch.device(...).type
    needs_grad: bool  # the output needs a gradient
    output_layout: str  # memory order of the output: "bhnd" or "bnhd"
    layer: int | None = None  # index of the layer in ``path``; may repeat, as in an encoder and a decoder
    layer_count: int | None = None  # number of layers in the same list; None: unknown
    path: str = ""  # module path as in named_modules(): decoder.layers.3.self_attn
    module_classes: tuple[str, ...] = ()  # class names, outermost first
    location: str = ""  # file:line in the user's code
    linear: LinearSpec | None = None  # attention without a softmax; None: a softmax of the score
    sink: bool = False  # one more column in the softmax, with a score but no value
    reads: tuple[str, ...] = ()  # user code's names of ``captures``, in order: attention_mask for padding
    notes: tuple[str, ...] = field(default=())  # remarks for the report: grouped heads folded back, opaque mask, ...

    @property
    def op(self) -> Op:
        return Op.SOFTMAX if self.linear is None else Op.LINEAR


def called_site(spec: AttentionSpec, position: Any, layout: Layout) -> Site:
    """The site of a direct call of a form by name, outside any graph, layer or user code."""
    return Site(
        name="attention",
        found_as="sdpa",
        stage="prefill",
        layout=layout,
        hints=layout,
        spec=spec,
        position=position,
        dtype="float32",
        device="",  # any
        needs_grad=False,
        output_layout="bhnd",
    )
