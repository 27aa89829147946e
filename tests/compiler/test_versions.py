"""What is asked of torch's inside is there in the version that is installed: else much would be lost in silence."""

from __future__ import annotations

import torch

from effattn import versions


def test_dynamo_tells_what_it_compiles():
    seen = []

    def backend(gm, args):
        made = versions.graph_being_made()
        seen.append((made.root_tx.f_code, set(made.root_tx.f_locals), callable(made.compiler_fn)))
        return gm.forward

    def doubled(x):
        return x + x

    torch._dynamo.reset()
    assert versions.graph_being_made() is None
    torch.compile(doubled, backend=backend)(torch.ones(3))
    assert versions.graph_being_made() is None
    assert seen == [(doubled.__code__, {"x"}, True)]


def test_the_argument_for_a_cache_is_one_that_the_model_takes():
    def older(ids, past_key_values=None): ...

    def newer(ids, cache=None): ...

    assert versions.cache_argument(older) == "past_key_values"
    assert versions.cache_argument(newer) == "cache"
