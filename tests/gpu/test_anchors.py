"""flex_attention against its definition, nn.MultiheadAttention against Inductor, on a GPU.

FlexAttention's own compiled kernels are no reference here: with these shapes (a block mask for a batch of 2, a length
that is no multiple of its blocks) those of torch 2.11 read outside their tensors.
"""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

B, H, N, D = 2, 8, 1000, 64


def qkv(groups: int = 2, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(B, H, N, D), (B, H // groups, N, D), (B, H // groups, N, D)]
    return [
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
        for shape in shapes
    ]


def documents() -> torch.Tensor:
    return (torch.arange(N, device="cuda") // 190).expand(B, N).contiguous()


def attend(mask, score=None, **options):
    def call(q, k, v):
        blocks = create_block_mask(mask, B, None, N, N, device="cuda")
        return flex_attention(q, k, v, block_mask=blocks, score_mod=score, enable_gqa=True, **options)

    return call


SLOPES = [2.0**-head for head in range(1, H + 1)]


def cases() -> dict[str, tuple]:
    ids, slopes = documents(), torch.tensor(SLOPES, device="cuda")
    return {
        "causal": (lambda b, h, i, j: i >= j, None),
        "window": (lambda b, h, i, j: (i >= j) & (i - j < 130), None),
        "documents": (lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j]), None),
        "alibi": (lambda b, h, i, j: i >= j, lambda s, b, h, i, j: s + slopes[h] * (j - i)),
        "soft cap": (lambda b, h, i, j: i >= j, lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0)),
        "empty rows": (lambda b, h, i, j: j + 200 < i, None),
    }


def definition(mask, score, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of every pair of positions in float64; rows without keys give 0 and -inf."""
    b, h, i, j = torch.meshgrid(
        *(torch.arange(n, device="cuda") for n in (B, H, N, N)),
        indexing="ij",
    )
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1).double() for x in (k, v))
    scores = q.double() @ k.mT / D**0.5
    scores = score(scores, b, h, i, j) if score else scores
    scores = scores.masked_fill(~mask(b, h, i, j), -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ v, lse


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="effattn", fullgraph=True, options={"strict": True, **options})


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("case", ["causal", "window", "documents", "alibi", "soft cap", "empty rows"])
def test_flex_attention(case, mode):
    with torch.no_grad():
        actual = compiled(attend(*cases()[case]), mode=mode)(*qkv())
        expected, _ = definition(*cases()[case], *qkv())
    assert_close(actual.double(), expected, 2e-2)


def test_flex_attention_lse():
    with torch.no_grad():
        _, actual = compiled(attend(*cases()["empty rows"], return_lse=True))(*qkv())
        _, expected = definition(*cases()["empty rows"], *qkv())
    assert_close(actual.double(), expected, 1e-3)


@pytest.mark.parametrize("case", ["causal", "documents", "soft cap"])
def test_flex_attention_backward(case):
    args, weight = qkv(grad=True), qkv()[0]
    actual = torch.autograd.grad(compiled(attend(*cases()[case]))(*args), args, weight)
    wanted = torch.autograd.grad(definition(*cases()[case], *args)[0], args, weight.double())
    for got, want in zip(actual, wanted, strict=True):
        assert_close(got.double(), want.double(), 4e-2)


def both(function, *args):
    """What the backend gives, and what Inductor gives alone."""
    torch._dynamo.reset()
    expected = torch.compile(function, fullgraph=True)(*args)
    return compiled(function)(*args), expected


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "grad"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_encoder(grad, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, device="cuda", dtype=torch.bfloat16)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(B, N, 128, device="cuda", dtype=torch.bfloat16)
    hidden = torch.arange(N, device="cuda") >= torch.tensor([[N], [N - 77]], device="cuda") if padded else None

    def call(x):
        return module(x, src_key_padding_mask=hidden)

    with torch.set_grad_enabled(grad):
        actual, expected = both(call, x)
    assert_close(actual, expected, 4e-2)


def test_causal_multi_head_attention():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(128, 4, batch_first=True, device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(B, N, 128, device="cuda", dtype=torch.bfloat16)

    def call(x):
        mask = nn.Transformer.generate_square_subsequent_mask(N, device="cuda", dtype=torch.bfloat16)
        return module(x, x, x, attn_mask=mask, need_weights=False)[0]

    with torch.no_grad():
        actual, expected = both(call, x)
    assert_close(actual, expected, 2e-2)
