"""The mods that FlexAttention's own examples are made of: each is read, or left alone for the reason that is true."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from comparing import assert_close
from compiled import compiled
from torch.nn.attention.flex_attention import create_block_mask, flex_attention, or_masks

from effattn.ir.refusal import Why

B, H, N, D, BLOCK = 2, 4, 40, 16, 16
WIDTH = 8  # of an image of 5 x 8 tokens


def random(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


QKV = [random(B, H, N, D, seed=seed) for seed in range(3)]


def attend(q, k, v, mask=None, score=None):
    """flex_attention with its block mask made in the same graph."""
    blocks = None
    if mask is not None:
        blocks = create_block_mask(mask, B, H, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=BLOCK)
    return flex_attention(q, k, v, block_mask=blocks, score_mod=score)


def causal(b, h, i, j):
    return i >= j


# -- masks ---------------------------------------------------------------------------------------------------------

OFFSETS = torch.tensor([0, 11, 18, 40])
DOCUMENT = torch.repeat_interleave(torch.arange(3), torch.tensor([11, 7, 22]))
PREFIX = torch.tensor([5, 9])
STARTS, LENGTHS = torch.tensor([[3, 1], [20, 30]]), torch.tensor([[6, 2], [4, 5]])
IMAGES = torch.tensor([2, 15, 28])
PAGES = torch.randperm(10, generator=torch.Generator().manual_seed(3)).expand(B, -1).clone()
PAGES[1, 4:] = -1  # not taken
WINDOWS = torch.tensor([1, 3, 9, 40])
SEEN = random(N, N) > 0
BITS = torch.randint(-9, 9, (B, N), generator=torch.Generator().manual_seed(3))


def sliding_window(b, h, i, j):
    return (i >= j) & (i - j <= 7)


def dilated_window(b, h, i, j):
    return (i >= j) & (i - j <= 12) & ((i - j) % 3 == 0)


def prefix_lm(b, h, i, j):
    return or_masks(lambda b, h, i, j: j < PREFIX[b], causal)(b, h, i, j)


def documents_by_offsets(b, h, i, j):
    one, two = i - OFFSETS[DOCUMENT[i]], j - OFFSETS[DOCUMENT[j]]
    return (DOCUMENT[i] == DOCUMENT[j]) & sliding_window(b, h, one, two)


def neighbourhood(b, h, i, j):
    rows, columns = (i // WIDTH).clamp(1, N // WIDTH - 2), (i % WIDTH).clamp(1, WIDTH - 2)
    return ((rows - j // WIDTH).abs() <= 1) & ((columns - j % WIDTH).abs() <= 1)


def _every_second_bit(x):
    x = x & 0x55
    x = (x | (x >> 1)) & 0x33
    return (x | (x >> 2)) & 0x0F


def neighbourhood_in_morton_order(b, h, i, j):
    rows = (_every_second_bit(i >> 1) - _every_second_bit(j >> 1)).abs() <= 1
    return rows & ((_every_second_bit(i) - _every_second_bit(j)).abs() <= 1)


def interleaved_bits(b, h, i, j):
    x = (i | (i << 4)) & 0x0F0F
    x = (x | (x << 2)) & 0x3333
    return ((x | (j << 1)) % 3 != 0) | (i == j)


def equal_bits(b, h, i, j):
    return ((i ^ j) & 5) <= 1


def bits_of_negative_numbers(b, h, i, j):
    return ((((i - j) >> 1) | ~j) & -4 < -3) | ((BITS[b, i] & BITS[b, j]) == (BITS[b, i] ^ -2)) | (i == j)


def transfusion(b, h, i, j):
    seen = i >= j
    for n in range(2):
        seen = seen | ((i >= STARTS[n, b]) & (j >= STARTS[n, b]) & (j < STARTS[n, b] + LENGTHS[n, b]))
    return seen


def flamingo(b, h, i, j):
    image = j // 14
    following = torch.where(image + 1 < 3, IMAGES[(image + 1).clamp(max=2)], N)
    return (i >= IMAGES[image]) & (i < following)


def pages(b, h, i, j):
    logical = PAGES[b, j // 4]
    return torch.where(logical >= 0, i >= logical * 4 + j % 4, False)


def window_of_each_head(b, h, i, j):
    return (i >= j) & (i - j < WINDOWS[h])


def table_of_booleans(b, h, i, j):
    return SEEN[i, j] | (i == j)


# -- scores --------------------------------------------------------------------------------------------------------

TABLE, ROUND, BUCKETS = random(H, 39), random(H, 2 * N), random(32, H)
_DISTANCE = torch.arange(-N + 1, N)
_FAR = 8 + (torch.log(_DISTANCE.abs().clamp(min=1) / 8.0) / math.log(16) * 8).long()
BUCKET = torch.where(_DISTANCE.abs() < 8, _DISTANCE.abs(), _FAR.clamp(max=15)) + (_DISTANCE > 0) * 16
FACTORS, SLOPES, VECTORS = random(H).abs(), random(H, seed=4).abs(), random(N, 4)
LONG = random(N, 32)


def alibi(s, b, h, i, j):
    return s + torch.exp2(-((h + 1) * 8.0 / H)) * (j - i)


def soft_cap(s, b, h, i, j):
    return 3.0 * torch.tanh(s / 3.0)


def soft_cap_by_fraction(s, b, h, i, j):
    x = s / 3.0
    return 3.0 * x * (27 + x * x) / (27 + 9 * x * x)


def soft_cap_by_sigmoid(s, b, h, i, j):
    return 3.0 * (2 * torch.sigmoid(2 * s / 3.0) - 1)


def relative_table(s, b, h, i, j):
    return s + TABLE[h, (j - i).clamp(-19, 19) + 19]


def index_that_counts_from_the_end(s, b, h, i, j):
    return s + ROUND[h, i - j + 3] + ROUND[h][-1] + ROUND[-1, j]


def buckets(s, b, h, i, j):
    return s + BUCKETS[BUCKET[j - i + N - 1], h]


def document_alibi(s, b, h, i, j):
    one, two = i - OFFSETS[DOCUMENT[i]], j - OFFSETS[DOCUMENT[j]]
    return torch.where(DOCUMENT[i] == DOCUMENT[j], s + 0.1 * (two - one), -torch.inf)


def page_scores(s, b, h, i, j):
    place = PAGES[b, j // 4] * 4 + j % 4
    return torch.where(place >= 0, torch.where(i >= place, s + 0.1 * (place - i), -torch.inf), -torch.inf)


def checkerboard(s, b, h, i, j):
    return torch.where((i - j).abs() % 2 == 1, s * 0.5, torch.where(i == j, s * 2.0, s))


def kerple(s, b, h, i, j):
    return s - FACTORS[h] * torch.log1p(SLOPES[h] * (i - j).abs())


def log_distance(s, b, h, i, j):
    """-inf at the query's own place, NaN beyond it, where the mask hides it: the first row keeps nothing."""
    return s + torch.log(i - j)


def log_of_length(s, b, h, i, j):
    return s * torch.log2(i + 2.0)


def waves(s, b, h, i, j):
    return s + torch.sin(0.3 * (i - j)) * torch.cos(j * 0.1)


def roots_and_squares(s, b, h, i, j):
    return s - torch.sqrt((i - j).abs().float()) + 0.01 * (i - j) ** 2 + 0.1 * torch.square(s) - torch.rsqrt(i + 1.0)


def powers(s, b, h, i, j):
    return s * 0.9 ** (i - j) + torch.relu(s) * torch.sign(s) + torch.reciprocal(j + 1.0)


def products_of_vectors(s, b, h, i, j):
    return s + torch.dot(VECTORS[i], VECTORS[j]) + (VECTORS[i] * VECTORS[j]).sum(-1)


def of_batch_and_head(s, b, h, i, j):
    return s * (1 + 0.5 * b) + h


MASKS = [
    *(causal, sliding_window, dilated_window, prefix_lm, documents_by_offsets, neighbourhood),
    *(neighbourhood_in_morton_order, interleaved_bits, equal_bits, bits_of_negative_numbers, transfusion, flamingo),
    *(pages, window_of_each_head, table_of_booleans),
]
SCORES = [
    *(alibi, soft_cap, soft_cap_by_fraction, soft_cap_by_sigmoid, relative_table, index_that_counts_from_the_end),
    *(buckets, document_alibi, page_scores, checkerboard, kerple, log_distance, log_of_length, waves),
    *(roots_and_squares, powers, products_of_vectors, of_batch_and_head),
]
CAUSAL = (log_distance, powers, of_batch_and_head)  # scores that are tried together with a mask


def call(mod):
    if mod in SCORES:
        return lambda q, k, v: attend(q, k, v, causal if mod in CAUSAL else None, mod)
    return lambda q, k, v: attend(q, k, v, mod)


@pytest.mark.parametrize("target", ["portable", "triton"])
@pytest.mark.parametrize("mod", MASKS + SCORES, ids=lambda mod: mod.__name__)
def test_mods_are_read(mod, target):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*using the portable target.*")
        report, _ = compiled(call(mod), *QKV, target=target, verify=target == "portable")
    assert report.missed == [], report.missed
    assert [site.found_as for site in report.sites] == ["flex_attention"]


@pytest.mark.parametrize(
    "mod", [soft_cap_by_sigmoid, roots_and_squares, powers, log_distance], ids=lambda m: m.__name__
)
def test_gradients_of_scores(mod, monkeypatch):
    # flex_attention itself has no backward on the CPU, the op has
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    inputs = [tensor.clone().requires_grad_() for tensor in QKV]
    q, k, v = inputs
    b, h, i, j = (torch.arange(n).view([-1 if m == d else 1 for m in range(4)]) for d, n in enumerate((B, H, N, N)))
    scores = mod(q @ k.mT * D**-0.5, b, h, i, j)
    if mod in CAUSAL:
        scores = scores.masked_fill(~causal(b, h, i, j), -torch.inf)
    empty = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    expected = torch.autograd.grad(((weights @ v) ** 2).sum(), inputs)
    torch._dynamo.reset()
    fast = torch.compile(call(mod), backend="effattn", options={"rest": "eager", "strict": True})
    for got, want in zip(torch.autograd.grad((fast(*inputs) ** 2).sum(), inputs), expected, strict=True):
        assert_close(got, want, 1e-4)


# -- what is left alone --------------------------------------------------------------------------------------------


def buckets_by_rounding(s, b, h, i, j):
    distance = (i - j).abs()
    far = 8 + (torch.log(distance.float() / 8.0) / math.log(16) * 8).to(torch.int64)
    return s + BUCKETS[torch.where(distance < 8, distance, far.clamp(max=15)), h]


def long_products(s, b, h, i, j):
    return s + torch.dot(LONG[i], LONG[j])


def shifted_by_data(s, b, h, i, j):
    return s + (i << BITS[b, j].abs())


@pytest.mark.parametrize("mod", [buckets_by_rounding, long_products, shifted_by_data], ids=lambda mod: mod.__name__)
def test_what_is_left_alone(mod):
    report, _ = compiled(lambda q, k, v: attend(q, k, v, None, mod), *QKV)
    assert report.sites == []
    assert report.missed[0].rule == Why.MOD
