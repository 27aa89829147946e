"""Forms on padded text: a window and its sinks count as they would without the padding."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effattn.compiler.capture import capture
from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.evaluate.tasks.site_errors import lower, site_errors
from effattn.lowering import forms
from effattn.policy import Policy
from effattn.runtime.targets.first_keys import first_keys, first_keys_of_equals

LENGTH, HEADS, DIM = 70, 2, 16
FORMS = {
    "window": {"window": 9, "sinks": 3},
    "power": {"block": 16, "window": 16, "sinks": 5},
}


def causal(q, k, v, mask=None):
    rows, keys = q.shape[2], k.shape[2]
    allowed = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def square(*args):
    *inputs, mask = args
    q, k, v = (x.reshape(x.shape[0], HEADS, -1, DIM) for x in inputs)  # sizes that stay fixed where others are symbolic
    places = torch.arange(q.shape[2])
    allowed = (places <= places[:, None]) & mask[:, None, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def packed(q, k, v, ids, mask=None):
    rows, keys = q.shape[2], k.shape[2]
    allowed = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    allowed = allowed & (ids[:, None, keys - rows :, None] == ids[:, None, None])
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def run(form, target, *args, function=causal):
    """The output of ``function`` with a form, as if for inference; fails if it was refused."""
    policy = {"rule": [{"forms": [form], "params": {form: FORMS[form]}}]}
    options = {"rest": "eager", "policy": policy, "strict": True, "verify": False}
    torch._dynamo.reset()
    with collect.listening() as heard, torch.no_grad():
        given = options | ({"target": target} if target else {})
        out = torch.compile(function, backend="effattn", options=given)(*args)
    assert [site.form for site in heard.report(Options.read(options)).sites] == [form]
    return out


def tensors(batch=1, rows=LENGTH, keys=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, HEADS, rows, DIM), (batch, HEADS, keys, DIM), (batch, HEADS, keys, DIM))
    return [torch.randn(size, generator=generator) for size in sizes]


def padded(lefts, rights=None):
    mask = torch.ones(len(lefts), LENGTH, dtype=torch.bool)
    for row, (left, right) in enumerate(zip(lefts, rights or [0] * len(lefts), strict=True)):
        mask[row, :left] = False
        mask[row, LENGTH - right :] = False
    return mask


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_ones_is_no_mask(form):
    q, k, v = tensors(2)
    torch.testing.assert_close(run(form, None, q, k, v, padded([0, 0])), run(form, None, q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [LENGTH, 1])
@pytest.mark.parametrize("form", FORMS)
def test_padding_on_the_left_changes_nothing(form, rows):
    """Each text of the batch is as on its own. Blocks of ``power`` are counted with the padding: whole ones here."""
    lefts = [0, 16, 32, 48]
    q, k, v = tensors(4, rows)
    out = run(form, None, q, k, v, padded(lefts))
    for row, left in enumerate(lefts):
        own = [x[row : row + 1, :, max(left - (LENGTH - x.shape[2]), 0) :] for x in (q, k, v)]
        assert own[1].shape[2] == LENGTH - left
        alone = run(form, None, *own)
        torch.testing.assert_close(out[row : row + 1, :, -alone.shape[2] :], alone, atol=1e-5, rtol=1e-5)
    assert out.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_padding_on_the_right_changes_nothing_before_it(form):
    q, k, v = tensors(2)
    out, plain = run(form, None, q, k, v, padded([0, 0], [0, 50])), run(form, None, q, k, v)
    torch.testing.assert_close(out[0], plain[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1, :, :20], plain[1, :, :20], atol=1e-5, rtol=1e-5)
    assert out.isfinite().all()  # also of queries that are far from any key


@pytest.mark.parametrize("form", FORMS)
def test_text_with_gaps_is_exact(form):
    """Distances between its tokens would count what is masked, as after padding on the right and further steps."""
    q, k, v = tensors(2)
    mask = padded([0, 3])
    mask[1, 20:30] = False
    out, exact = run(form, None, q, k, v, mask), causal(q, k, v, mask)
    torch.testing.assert_close(out[1, :, 3:], exact[1, :, 3:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[0], exact[0], atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_it_can_be_evaluated(form):
    """Errors and shares of kept keys are measured with the mask that the op uses."""
    policy = Policy.of({"rule": [{"forms": [form], "params": {form: FORMS[form]}}]})
    found = []

    def measure(captured):
        found.extend(site_errors(captured, [lower(captured, policy)]))

    q, k, v = tensors(2)
    mask = padded([0, 16])
    torch._dynamo.reset()
    assert capture(square, measure, q, k, v, mask) == 1
    exact, out = causal(q, k, v, mask)[1, :, 16:], run(form, None, q, k, v, mask)
    assert 0 < found[0].error < 1
    assert 0 < torch.linalg.vector_norm(out[1, :, 16:] - exact) < torch.linalg.vector_norm(exact)


TARGETS = pytest.mark.parametrize("target", [None, "triton"])
LENGTHS = (23, 1, 34, 12)  # of documents


def of_reference(form, q, k, v):
    """The form's own definition, and SDPA."""
    rows = torch.arange(q.shape[2])[:, None]
    kept = forms.FORMS[form].reference(forms.FORMS[form].params(**FORMS[form]), rows, rows.T) & (rows >= rows.T)
    return scaled_dot_product_attention(q, k, v, attn_mask=kept)


def documents(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)) + 3, torch.tensor(lengths))[None]


@TARGETS
@pytest.mark.parametrize("form", FORMS)
def test_each_document_is_as_on_its_own(form, target):
    """Its distances, its blocks and its sinks are counted from its first key, in every batch."""
    q, k, v = tensors(2)
    ids = torch.cat([documents(*LENGTHS), documents(5, 65)])
    out = run(form, target, q, k, v, ids, function=packed)
    for row, lengths in enumerate((LENGTHS, (5, 65))):
        parts = [x[row : row + 1].split(lengths, dim=2) for x in (q, k, v)]
        alone = torch.cat([of_reference(form, *part) for part in zip(*parts, strict=True)], dim=2)
        torch.testing.assert_close(out[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_documents_of_a_cache(form):
    """The last queries of the same text."""
    q, k, v = tensors(1)
    whole = run(form, None, q, k, v, documents(*LENGTHS), function=packed)
    for rows in (1, 30):
        out = run(form, None, q[:, :, -rows:], k, v, documents(*LENGTHS), function=packed)
        torch.testing.assert_close(out, whole[:, :, -rows:], atol=1e-5, rtol=1e-5)


@TARGETS
@pytest.mark.parametrize("form", FORMS)
def test_documents_and_padding(form, target):
    q, k, v = tensors(2)
    mask, ids = padded([0, 16]), documents(*LENGTHS).expand(2, -1)
    out = run(form, target, q, k, v, ids, mask, function=packed)
    plain = run(form, None, q, k, v, documents(*LENGTHS), function=packed)
    torch.testing.assert_close(out[0], plain[0], atol=1e-5, rtol=1e-5)
    own = [x[1:, :, 16:] for x in (q, k, v)]
    shorter = run(form, None, *own, documents(7, 1, 34, 12), function=packed)
    torch.testing.assert_close(out[1:, :, 16:], shorter, atol=1e-5, rtol=1e-5)
    assert out.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_documents_of_ones_are_no_documents(form):
    q, k, v = tensors(2)
    ones = torch.ones(2, LENGTH, dtype=torch.int64)
    out = run(form, None, q, k, v, ones, ones > 0, function=packed)
    torch.testing.assert_close(out, run(form, None, q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_no_sinks(form, monkeypatch):
    """Padded queries may keep nothing, which gives 0."""
    monkeypatch.setitem(FORMS, form, {**FORMS[form], "sinks": 0})
    q, k, v = tensors(2)
    out = run(form, None, q, k, v, padded([0, 16], [0, 30]))
    torch.testing.assert_close(out[0], run(form, None, q, k, v)[0], atol=1e-5, rtol=1e-5)
    own = [x[1:, :, 16:40] for x in (q, k, v)]
    torch.testing.assert_close(out[1:, :, 16:40], run(form, None, *own), atol=1e-5, rtol=1e-5)
    assert out.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_documents_in_turns_are_exact(form):
    q, k, v = tensors(1)
    turns = (torch.arange(LENGTH) % 3)[None]
    out, exact = run(form, None, q, k, v, turns, function=packed), packed(q, k, v, turns)
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_for_each_query_and_key(form):
    """Chunks that begin where a table says: no comparison of two sides, so every pair is looked at."""
    starts = torch.tensor([0] * 23 + [23] * 24 + [47] * 23)[None]

    def chunked(q, k, v, starts):
        places = torch.arange(q.shape[2])
        allowed = (places <= places[:, None]) & (places >= starts[:, None, :, None])
        return scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    q, k, v = tensors(1)
    out = run(form, None, q, k, v, starts, function=chunked)
    wanted = run(form, None, q, k, v, documents(23, 24, 23), function=packed)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_first_keys_of_equals():
    """By sorting as by looking at every pair."""
    generator = torch.Generator().manual_seed(0)
    for most in (1, 3, 8):
        for _ in range(10):
            of_key = torch.randint(0, most, (3, 17), generator=generator).sort(dim=1).values
            of_key[2] = torch.randint(0, most, (17,), generator=generator)
            of_query = torch.randint(-1, most + 1, (3, 29), generator=generator)
            allowed = torch.rand(3, 17, generator=generator) > 0.2
            pairs = (of_query[:, :, None] == of_key[:, None]) & allowed[:, None]
            assert torch.equal(first_keys_of_equals(of_query, of_key, allowed), first_keys(pairs))


def test_first_keys():
    rows = ["1111", "0111", "0110", "1011", "0000", "0001", "1100"]
    allowed = torch.tensor([[char == "1" for char in row] for row in rows])
    assert first_keys(allowed).tolist() == [0, 1, 1, 4, 4, 3, 0]
    assert first_keys(allowed).dtype == torch.int32


@pytest.mark.parametrize("form", FORMS)
def test_texts_with_lengths(form):
    """Padding that is told by where it ends, as bounds of keys."""
    starts, ends = torch.tensor([0, 16]), torch.tensor([70, 60])

    def bounded(q, k, v, starts, ends):
        places = torch.arange(q.shape[2])
        live = (places >= starts[:, None, None, None]) & (places < ends[:, None, None, None])
        return scaled_dot_product_attention(q, k, v, attn_mask=(places <= places[:, None]) & live)

    q, k, v = tensors(2)
    out, wanted = (
        run(form, None, q, k, v, starts, ends, function=bounded),
        run(form, None, q, k, v, padded([0, 16], [0, 10])),
    )
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@TARGETS
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_documents(form, target):
    """The backward counts as the forward does, from the first key that it finds again."""
    inputs = [x.requires_grad_() for x in tensors(1)]
    parts = zip(*(x.split((5, 65), dim=2) for x in inputs), strict=True)
    weights = torch.randn(1, HEADS, LENGTH, DIM, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([of_reference(form, *part) for part in parts], dim=2)
    wanted = torch.autograd.grad(alone, inputs, weights)
    options = {"rest": "eager", "policy": {"rule": [{"forms": [form], "params": {form: FORMS[form]}}]}, "strict": True}
    torch._dynamo.reset()
    compiled = torch.compile(packed, backend="effattn", options=options | ({"target": target} if target else {}))
    out = compiled(*inputs, documents(5, 65))
    torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, weights), wanted, atol=1e-5, rtol=1e-4)
