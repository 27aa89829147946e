"""nn.MultiheadAttention and the Transformer modules: one node for Dynamo, attention like any other for us."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from torch import nn

from effattn.ir.refusal import Why

WIDTH, HEADS, B, N, S = 24, 3, 2, 9, 6


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options).eval()
    for bias in (module.in_proj_bias, module.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return module


def inputs(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, length, WIDTH, generator=generator) for length in lengths]


def padding(length: int, seen: tuple[int, ...] = (6, 4)) -> torch.Tensor:
    return torch.arange(length) >= torch.tensor(seen)[:, None]


def only(report):
    assert report.missed == [], report.missed
    (site,) = report.sites
    assert site.found_as == "multi_head_attention"
    assert "multi_head_attention_forward" not in report.graph()
    return site


def test_self_attention_projects_once_and_is_found():
    module = attention()
    report, _ = compiled(lambda x: module(x, x, x, need_weights=False)[0], *inputs(N))
    assert only(report).predicate == "true"
    assert report.graph().count("._nn.linear(") == 2


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_weights_that_nobody_takes(grad, train):
    module = attention().train(train)
    with torch.set_grad_enabled(grad):
        report, _ = compiled(lambda x: module(x, x, x)[0], *inputs(N))
    assert only(report).form == "exact"
    assert only(report).stage == ("train" if grad else "encoder")


def test_gradients_reach_the_projections():
    module = attention()
    (x,) = inputs(N)
    mask = nn.Transformer.generate_square_subsequent_mask(N)

    def loss():
        module.zero_grad()
        return (module(x, x, x, attn_mask=mask, need_weights=False)[0] ** 2).sum()

    loss().backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    torch._dynamo.reset()
    torch.compile(loss, backend="effattn", options={"rest": "eager", "strict": True})().backward()
    for got, want in zip(module.parameters(), expected, strict=True):
        assert_close(got.grad, want, 1e-4)


def causal_inside(module, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return module(x, x, x, attn_mask=mask, need_weights=False)[0]


def causal_hint(module, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def causal_bool(module, x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return module(x, x, x, attn_mask=mask, need_weights=False)[0]


def causal_with_weights(module, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return module(x, x, x, attn_mask=mask)[0]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "call", [causal_inside, causal_hint, causal_bool, causal_with_weights], ids=lambda call: call.__name__
)
def test_causal_masks_disappear(call, dynamic):
    module = attention()
    report, _ = compiled(lambda x: call(module, x), *inputs(N), lengths=(0, 1) if dynamic else ())
    assert only(report).predicate == "k <= q"
    assert "triu" not in report.graph()
    assert "softmax" not in report.graph()


def masked_and_padded(module, x, hidden):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return module(x, x, x, attn_mask=mask, key_padding_mask=hidden, need_weights=False)[0]


def floats_and_padded(module, x, hidden):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    padded = torch.zeros_like(x[..., 0]).masked_fill(hidden, float("-inf"))
    return module(x, x, x, attn_mask=mask, key_padding_mask=padded, need_weights=False)[0]


@pytest.mark.parametrize("call", [masked_and_padded, floats_and_padded], ids=lambda call: call.__name__)
def test_padding_and_mask_are_merged(call):
    module = attention()
    report, _ = compiled(lambda x, hidden: call(module, x, hidden), *inputs(N), padding(N))
    assert only(report).predicate == "k <= q & ~padding[b, k]"


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("seen", [(6, 4), (6, 0)], ids=["some", "none"])
def test_padding_of_keys_in_cross_attention(need_weights, seen):
    """A batch entry without a single key is 0 where the function calls SDPA, NaN where it makes weights."""
    module = attention()

    def call(x, y, hidden):
        return module(x, y, y, key_padding_mask=hidden, need_weights=need_weights)[0]

    report, out = compiled(call, *inputs(N, S), padding(S, seen))
    assert only(report).predicate == "~padding[b, k]"
    assert out.isnan().any().item() == (need_weights and 0 in seen)


def test_mask_for_every_head():
    module = attention()
    mask = torch.randn(B * HEADS, N, S, generator=torch.Generator().manual_seed(2))
    report, _ = compiled(
        lambda x, y, m: module(x, y, y, attn_mask=m, need_weights=False)[0], *inputs(N, S), mask, tolerance=1e-4
    )
    assert only(report).found_as == "multi_head_attention"


@pytest.mark.parametrize("options", [{"kdim": 10, "vdim": 14}, {"bias": False}], ids=str)
def test_projections_apart(options):
    module = attention(**options)
    x, y, z = inputs(N, S, S)
    y, z = (y[..., :10], z[..., :14]) if "kdim" in options else (y, z)
    report, _ = compiled(lambda x, y, z: module(x, y, z, need_weights=False)[0], x, y, z)
    assert only(report).layout.startswith(f"B {B}, heads {HEADS}/{HEADS}, N {N} x {S}")


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_batch(masked):
    module = attention()
    hidden = padding(N)[0] if masked else None
    report, out = compiled(lambda x: module(x, x, x, key_padding_mask=hidden, need_weights=False)[0], inputs(N)[0][0])
    assert only(report)
    assert out.shape == (N, WIDTH)


def test_autocast_inside_the_graph():
    module = attention()

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return causal_inside(module, x)

    report, out = compiled(call, *inputs(N), tolerance=2e-2)
    assert only(report).predicate == "k <= q"
    assert out.dtype == torch.bfloat16


LEFT_ALONE = {
    "weights are returned": lambda: (attention(), {}, Why.WEIGHTS),
    "dropout": lambda: (attention(dropout=1.0).train(), {"need_weights": False}, Why.DROPOUT),
    "add_zero_attn": lambda: (attention(add_zero_attn=True), {"need_weights": False}, Why.MULTI_HEAD_ATTENTION),
    "bias_k": lambda: (attention(add_bias_kv=True), {"need_weights": False}, Why.MULTI_HEAD_ATTENTION),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_left_alone_says_why(case):
    module, options, rule = LEFT_ALONE[case]()

    def call(x):
        torch.manual_seed(3)
        return module(x, x, x, **options)

    report, _ = compiled(call, *inputs(N), verify=False)
    assert report.sites == []
    assert report.missed[0].rule == rule
    assert "multi_head_attention_forward" in report.graph()


# -- nn.Transformer ------------------------------------------------------------------------------------------------


def encoder(**options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["fused", "grad"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_encoder(options, grad, padded):
    module = encoder(**options)
    hidden = padding(N) if padded else None
    with torch.set_grad_enabled(grad):
        report, _ = compiled(
            lambda x, hidden: module(x, src_key_padding_mask=hidden), inputs(N)[0][..., :16], hidden, tolerance=1e-4
        )
    assert [site.found_as for site in report.sites] == ["multi_head_attention"] * 2
    assert {site.predicate for site in report.sites} == {"~padding[b, k]" if padded else "true"}
    assert [site.layer for site in report.sites] == [0, 1]
    assert report.missed == []
    assert "transformer_encoder_layer" not in report.graph()


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "grad"])
def test_causal_encoder(grad):
    module = encoder()

    def call(x):
        return module(x, mask=torch.ones(N, N, dtype=torch.bool).triu(1), is_causal=False)

    with torch.set_grad_enabled(grad):
        report, _ = compiled(call, inputs(N)[0][..., :16], tolerance=1e-4)
    assert [site.predicate for site in report.sites] == ["k <= q"] * 2


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_encoder_under_autocast_keeps_its_dtype(dtype, inside):
    """It computes and returns the lower dtype, and torch's own fake value says float32."""
    module = encoder()

    def call(x):
        with torch.autocast("cpu", dtype, enabled=inside or torch.is_autocast_enabled("cpu")):
            return module(x)

    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=not inside):
        report, out = compiled(call if inside else module, inputs(N)[0][..., :16], tolerance=0)
    assert out.dtype == dtype
    assert report.sites == []
    assert all(missed.rule == Why.DTYPE for missed in report.missed)


def test_encoder_under_autocast_without_its_fast_path_is_found():
    module = encoder()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            report, out = compiled(module, inputs(N)[0][..., :16], tolerance=4e-2)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert len(report.sites) == 2
    assert out.dtype == module(inputs(N)[0][..., :16]).dtype


def test_autocast_that_ended_or_begins_later():
    module = encoder()
    other = nn.MultiheadAttention(16, 2, batch_first=True).eval()

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            x = x + other(x, x, x, need_weights=False)[0]
        x = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            return x + other(x, x, x, need_weights=False)[0]

    with torch.no_grad():
        report, _ = compiled(call, inputs(N)[0][..., :16], tolerance=4e-2)
    assert len(report.sites) == 4
    assert report.missed == []


def test_fused_layer_without_a_single_key_is_nan():
    module = encoder()
    with torch.no_grad():
        report, out = compiled(
            lambda x, hidden: module(x, src_key_padding_mask=hidden), inputs(N)[0][..., :16], padding(N, (0, 5))
        )
    assert len(report.sites) == 2
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_decoder_has_self_and_cross_attention():
    torch.manual_seed(0)
    module = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True), 1).eval()

    def call(x, y):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return module(x, y, tgt_mask=mask, tgt_is_causal=True)

    with torch.no_grad():
        report, _ = compiled(call, *inputs(N, S), tolerance=1e-4)
    assert [(site.stage, site.predicate) for site in report.sites] == [("prefill", "k <= q"), ("cross", "true")]


def test_function_with_everything_by_name():
    module = attention()
    w = dict(module.named_parameters())

    def call(x):
        return F.multi_head_attention_forward(
            query=x, key=x, value=x, embed_dim_to_check=WIDTH, num_heads=HEADS, bias_k=None, bias_v=None,
            in_proj_weight=w["in_proj_weight"], in_proj_bias=w["in_proj_bias"], add_zero_attn=False, dropout_p=0.1,
            out_proj_weight=w["out_proj.weight"], out_proj_bias=None, training=False, need_weights=False,
        )[0]  # fmt: skip

    report, _ = compiled(call, inputs(N)[0].transpose(0, 1))
    assert only(report).predicate == "true"
