"""Masks that a model keeps for its longest text: a triangle is read as positions, and looked at in every call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from torch import nn

from effattn.compiler.backend import effattn
from effattn.passes.canonicalize import mask_buffers
from effattn.runtime.ops.mask_tables import is_causal_buffer

B, H, N, D, LONGEST = 2, 3, 9, 8, 16
INF = float("inf")


class Model(nn.Module):
    """Attention whose mask is cut out of a buffer by ``cut`` and used by ``attend``."""

    def __init__(self, buffer, cut, attend):
        super().__init__()
        self.register_buffer("mask", buffer)
        self.cut, self.attend = cut, attend

    def forward(self, q, k, v, *more):
        return self.attend(q, k, v, self.cut(self.mask, q.shape[2], k.shape[2], *more))


def filled(q, k, v, mask):
    return (q @ k.mT * 0.3).masked_fill(mask == 0, -INF).softmax(-1) @ v


def hidden(q, k, v, mask):
    return (q @ k.mT * 0.3).masked_fill(mask, torch.finfo(torch.float32).min).softmax(-1) @ v


def added(q, k, v, mask):
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def corner(mask, rows, columns):
    return mask[..., :rows, :columns]


def cut_twice(mask, rows, columns):
    return mask[:, :, :rows][..., :columns]


def whole(mask, rows, columns):
    return mask


def last_rows(mask, rows, columns):
    return mask[None, None, columns - rows : columns, :columns]


def at_positions(mask, rows, columns, positions):
    return mask[None, None, positions]


ONES = torch.ones(LONGEST, LONGEST)
LOWER = ONES.tril()
CASES = {
    "floats": (LOWER[None, None], corner, filled, "k <= q"),
    "two dimensions": (LOWER, corner, filled, "k <= q"),
    "bytes": (LOWER.to(torch.uint8), corner, filled, "k <= q"),
    "hidden": (ONES.triu(1).bool(), corner, hidden, "k <= q"),
    "infinity": (torch.full_like(ONES, -INF).triu(1), corner, added, "k <= q"),
    "sdpa": (LOWER.bool()[None, None], corner, sdpa, "k <= q"),
    "whole": (torch.ones(N, N).tril(), whole, filled, "k <= q"),
    "beyond the diagonal": (ONES.tril(2).bool(), corner, sdpa, "k <= 2 + q"),
    "before the diagonal": (ONES.tril(-2).bool(), corner, sdpa, "k <= -2 + q"),
    "last rows": (LOWER.bool(), last_rows, sdpa, "k <= 5 + q"),
    "positions": (LOWER.bool(), at_positions, sdpa, "k <= rows[q]"),
    "cut twice": (LOWER[None, None], cut_twice, filled, "k <= q"),
    # what is no triangle stays data
    "window": (ONES.tril().triu(-3).bool(), corner, sdpa, "mask[q, k]"),
    "three values": (LOWER + LOWER.triu(), corner, filled, "mask[q, k] != 0"),
    "all ones": (ONES, corner, filled, "mask[q, k] != 0"),
}


def inputs(name: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = 4 if name == "last rows" else N
    keys = LONGEST if name == "positions" else N
    tensors = [torch.randn(B, H, length, D, generator=generator) for length in (queries, keys, keys)]
    return [*tensors, torch.arange(5, 5 + N)] if name == "positions" else tensors


@pytest.mark.parametrize("name", CASES)
def test_read(name):
    buffer, cut, attend, predicate = CASES[name]
    with torch.no_grad():
        report, _ = compiled(Model(buffer.clone(), cut, attend), *inputs(name))
    assert [site.predicate for site in report.sites] == [predicate], report
    assert ("is_causal_buffer" in report.graph()) == ("mask" not in predicate)
    assert "torch.where" not in report.graph()


def test_one_graph_serves_all_lengths_and_gradients_flow():
    model = Model(LOWER[None, None].clone(), corner, filled)
    report, _ = compiled(model, *[x.requires_grad_() for x in inputs("")], lengths=(0, 2), verify=False)
    assert [(site.stage, site.predicate) for site in report.sites] == [("train", "k <= q")]
    assert "effattn.attend" in report.graph()


def test_a_mask_that_is_also_read_elsewhere_is_the_buffer_there():
    def both(q, k, v, mask):
        return filled(q, k, v, mask) + mask.sum()

    report, _ = compiled(Model(LOWER[None, None].clone(), corner, both), *inputs(""))
    assert report.sites[0].predicate == "k <= q"
    assert "is_causal_buffer" in report.graph()
    assert "torch.where" not in report.graph()


def test_a_graph_without_a_site_reads_its_buffer():
    def dropped(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=1.0)

    report, _ = compiled(Model(LOWER.bool().clone(), corner, dropped), *inputs(""))
    assert report.sites == []
    assert "is_causal_buffer" not in report.graph()


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_buffer_that_is_written_where_no_counter_tells_is_noticed(rest, grad):
    model = Model(LOWER[None, None].clone(), corner, filled)
    torch._dynamo.reset()
    fast = torch.compile(model, backend=lambda gm, given: effattn(gm, given, options={"rest": rest, "strict": True}))
    given = [x.requires_grad_(grad) for x in inputs("")]
    with torch.set_grad_enabled(grad):
        assert_close(fast(*given), model(*given))
        model.mask.data[..., 3, 1] = 0
        with pytest.raises(RuntimeError, match="a mask in a buffer of the model is no longer the triangle"):
            fast(*given)
        torch._dynamo.reset()
        assert_close(fast(*given), model(*given))


class Counting:
    """The backend, and how often Dynamo called it."""

    def __init__(self, **options):
        self.compiled, self.options = 0, {"rest": "eager", "strict": True, **options}

    def __call__(self, gm, given):
        self.compiled += 1
        return effattn(gm, given, options=self.options)


def changed(mask):
    mask[..., 3, 1] = 0


WRITES = {
    "in place": lambda model: model.mask[..., 3, 1].zero_(),
    "filled": lambda model: model.mask[..., :4].fill_(1),
    "loaded": lambda model: model.load_state_dict({"mask": LOWER[None, None].triu(-3)}),
    "another triangle": lambda model: model.load_state_dict({"mask": ONES[None, None].tril(2)}),
    "another tensor": lambda model: setattr(model, "mask", LOWER[None, None].triu(-3)),
}


@pytest.mark.filterwarnings("ignore:.*no longer holds what it held")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("write", WRITES)
def test_a_buffer_that_is_written_later_is_data(write, grad):
    model, backend = Model(LOWER[None, None].clone(), corner, filled), Counting()
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend)
    given = [x.requires_grad_(grad) for x in inputs("")]

    def same():
        with torch.set_grad_enabled(grad):
            out, wanted = fast(*given), model(*given)
            torch.testing.assert_close(out, wanted)
            if grad:
                found = (torch.autograd.grad(one.square().sum(), given) for one in (out, wanted))
                for one, other in zip(*found, strict=True):
                    torch.testing.assert_close(one, other)

    same()
    WRITES[write](model)
    same()
    same()
    model.load_state_dict({"mask": LOWER[None, None]})  # and back
    same()
    assert backend.compiled == 1


@pytest.mark.filterwarnings("ignore:.*no longer holds what it held")
def test_lengths_change_while_a_buffer_is_data():
    model = Model(LOWER[None, None].clone(), corner, filled)
    torch._dynamo.reset()
    fast = torch.compile(model, backend=Counting(), dynamic=True)
    fast(*inputs(""))
    changed(model.mask)
    for length in (9, 7, 12, 16):
        given = [torch.randn(B, H, length, D, generator=torch.Generator().manual_seed(n)) for n in range(3)]
        torch.testing.assert_close(fast(*given), model(*given))


def test_a_buffer_is_looked_at_only_when_it_was_written(monkeypatch):
    model, looks = Model(LOWER[None, None].clone(), corner, filled), []
    torch._dynamo.reset()
    fast = torch.compile(model, backend=Counting())
    fast(*inputs(""))
    monkeypatch.setattr(mask_buffers, "is_causal_buffer", lambda *args: looks.append(1) or is_causal_buffer(*args))
    for _ in range(3):
        fast(*inputs(""))
    assert looks == []
    model.load_state_dict(model.state_dict())
    for _ in range(3):
        fast(*inputs(""))
    assert looks == [1]


@pytest.mark.filterwarnings("ignore:.*no longer holds what it held")
def test_layers_that_share_a_graph_have_masks_of_their_own():
    """One compiled class serves layers with other buffers, as in a model that is compiled block by block."""
    torch._dynamo.reset()
    layers = [Model(mask[None, None].clone(), corner, filled) for mask in (LOWER, LOWER.triu(-3), LOWER)]
    backend = Counting()
    fast = [torch.compile(layer, backend=backend) for layer in layers]
    with torch.no_grad():
        for _ in range(2):
            for layer, one in zip(layers, fast, strict=True):
                torch.testing.assert_close(one(*inputs("")), layer(*inputs("")))


@pytest.mark.filterwarnings("ignore:.*no longer holds what it held")
@pytest.mark.slow
def test_written_later_under_inductor_and_verified():
    model = Model(LOWER[None, None].clone(), corner, filled)
    torch._dynamo.reset()
    fast = torch.compile(model, backend=Counting(rest="inductor", verify=True))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(*inputs("")), model(*inputs("")), rtol=1e-4, atol=1e-4)
            changed(model.mask)


def test_a_tensor_made_in_inference_mode_has_no_counter():
    with torch.inference_mode():
        model = Model(LOWER[None, None].clone(), corner, filled)
        torch._dynamo.reset()
        fast = torch.compile(model, backend=Counting())
        for _ in range(2):
            torch.testing.assert_close(fast(*inputs("")), model(*inputs("")))
        changed(model.mask)
        with pytest.raises(RuntimeError, match="no longer the triangle"):
            fast(*inputs(""))


def test_a_buffer_that_the_graph_writes_stays_data():
    def written(q, k, v, mask):
        mask.mul_(1)
        return filled(q, k, v, mask)

    report, _ = compiled(Model(LOWER.clone(), corner, written), *inputs(""))
    assert "is_causal_buffer" not in report.graph()


def test_a_mask_from_the_caller_stays_data():
    report, _ = compiled(lambda q, k, v, buffers_m: filled(q, k, v, buffers_m[:N, :N]), *inputs(""), LOWER)
    assert [site.predicate for site in report.sites] == ["mask[q, k] != 0"]
