"""A site's path is what ``named_modules()`` calls the module that computes it, however the model is called."""

from __future__ import annotations

import torch
from compiled import compiled
from torch import nn

from effattn.passes.graph.provenance import clean


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        return self.softmax(x @ x.mT) @ x


class Layers(nn.Module):
    def __init__(self, count: int = 2):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention()}) for _ in range(count)])

    def forward(self, x):
        for layer in self.layers:
            x = layer["self_attn"](x)
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Layers(), Layers(1)

    def forward(self, x):
        return self.decoder(self.encoder(x))


PATHS = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "decoder.layers.0.self_attn"]
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def names(function, *args):
    report, _ = compiled(function, *args)
    assert all(site.name == site.path for site in report.sites)
    return [(site.name, site.layer) for site in report.sites]


def test_a_module():
    assert names(Model(), X) == list(zip(PATHS, (0, 1, 0), strict=True))


def test_a_function_that_is_given_the_model():
    assert [name for name, _ in names(lambda *args: args[0](args[1]), Model(), X)] == PATHS
    assert [name for name, _ in names(lambda model, x: model(x), Model(), X)] == PATHS
    model = Model()
    assert [name for name, _ in names(lambda x: model(x), X)] == PATHS
    assert [name for name, _ in names(model.forward, X)] == PATHS


def test_modules_of_a_function_have_its_names():
    def run(encoder, decoder, x):
        return decoder(encoder(x))

    assert [name for name, _ in names(run, Layers(), Layers(1), X)] == PATHS


def test_wrappers_are_no_part_of_it():
    model = Model()
    model.encoder = torch.compile(model.encoder, backend="eager")
    assert [name for name, _ in names(model, X)] == PATHS


def test_sources():
    found = {
        "L['self'].layers.3.attn": "layers.3.attn",
        "L['self']._modules['layers']._modules['3']._parameters['weight']": "layers.3.weight",
        "getattr(getattr(L['self'], '0').blocks, '1').attn": "0.blocks.1.attn",
        "L['args'][0].model.layers.0": "model.layers.0",
        "L['kwargs']['model'].layers.0": "layers.0",
        "G['net'].plain[2]": "plain.2",
        "L['run'].__closure__[0].cell_contents.layers.1": "layers.1",
        "L['self']._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.attn": "layers.0.attn",
        "L['self']": "",
    }
    assert {source: clean(source) for source in found} == found


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("gains", torch.linspace(-1, 1, 3))

    def forward(self, x, attention_mask, **kwargs):
        keys = x[:, None].expand(-1, 3, -1, -1)
        scores = keys @ keys.mT + self.gains[:, None, None] * torch.arange(5)
        scores = scores.masked_fill(~attention_mask[:, None, None], -torch.inf)
        own = (x.mean(-1) > -9).long().cumsum(-1)
        scores = scores.masked_fill((own[:, :, None] != own[:, None])[:, None], -torch.inf)
        return (scores + kwargs["extra"][:, None, None]).softmax(-1) @ keys


def test_what_a_site_reads_has_the_users_names():
    """And the names that a kernel sees are those of what it is used for, so that no name makes a kernel anew."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    report, _ = compiled(
        lambda model, x, mask, extra: model(x, mask, extra=extra), Biased(), X, mask, torch.randn(2, 5)
    )
    (site,) = report.sites
    assert site.reads == {"padding": "mask", "document": "own", "slopes": "gains", "bias": "extra"}
    assert "padding[b, k]" in site.predicate
    assert "mask[b, k]" in site.predicate_shown
    assert "own[b, k]" in site.predicate_shown
    assert "gains[h]" in site.score_shown
    assert f"predicate  {site.predicate_shown}" in str(report)


def test_names_that_would_mislead_are_not_used():
    def attention(x, k, *rest):
        return (x @ x.mT).masked_fill(~k[:, None], -torch.inf).masked_fill(~rest[0][:, None], -torch.inf).softmax(
            -1
        ) @ x

    report, _ = compiled(attention, X, torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool))
    (site,) = report.sites
    assert site.reads == {"padding": "padding", "padding2": "padding2"}
