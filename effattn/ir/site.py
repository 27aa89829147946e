"""The site: one attention found in a graph, with everything that later steps may know about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from effattn.ir.attention import AttentionSpec

Stage = Literal["prefill", "decode", "train", "cross", "encoder"]
STAGES: tuple[Stage, ...] = ("prefill", "decode", "train", "cross", "encoder")


@dataclass(frozen=True)
class Layout:
    """Sizes of one attention. Each is an int or a sympy expression in the graph's symbolic lengths."""

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
        """The number of keys, if the graph serves no other; None: it is only known when the graph runs."""
        known = getattr(self.k_len, "is_Integer", isinstance(self.k_len, int))
        return int(self.k_len) if known else None

    def __str__(self) -> str:
        return (
            f"B {self.batch}, heads {self.heads}/{self.kv_heads}, N {self.q_len} x {self.k_len}, "
            f"D {self.head_dim}" + (f"/{self.value_dim}" if self.value_dim != self.head_dim else "")
        )


@dataclass(frozen=True)
class Site:
    """One attention: where it stands, its sizes, and in closed form what it computes."""

    name: str
    found_as: str  # "softmax", "sdpa", "flex_attention", "multi_head_attention"
    stage: Stage
    layout: Layout
    hints: Layout  # the same sizes as plain ints, for costs
    spec: AttentionSpec  # what the user's code computes: keeps all that the mask allows
    position: Any | None  # absolute index of query row q among the keys, from the causal condition; None if not causal
    dtype: str  # of query, key and value: "float32", "bfloat16", "float16"
    device: str  # "cpu", "cuda"
    needs_grad: bool  # of the output
    output_layout: str  # memory order to write: "bhnd" or "bnhd"
    captures_need_grad: bool = False  # a tensor that the score reads (a learned bias) needs a gradient itself
    layer: int | None = None  # a number in ``path``: it may repeat, as in an encoder and a decoder
    layer_count: int | None = None  # how many layers are counted with it; None: not known
    path: str = ""  # of the module it is computed in, as named_modules() calls it: decoder.layers.3.self_attn
    module_classes: tuple[str, ...] = ()  # class names, outermost first
    location: str = ""  # file:line in the user's code
    sink: bool = False  # one more column takes part in the softmax, with a score and without a value
    reads: tuple[str, ...] = ()  # the user's own names of ``captures``, in order: attention_mask for padding
    notes: tuple[str, ...] = field(default=())  # things worth telling: grouped heads folded back, opaque mask, ...


def called_site(spec: AttentionSpec, position: Any, layout: Layout) -> Site:
    """The site of an attention that is called by the name of its form: no graph, layer or user code is around it."""
    return Site(
        name="attention",
        found_as="sdpa",
        stage="prefill",
        layout=layout,
        hints=layout,
        spec=spec,
        position=position,
        dtype="float32",
        device="cpu",
        needs_grad=False,
        output_layout="bhnd",
    )
