"""Every kind of mask, in the spellings that people use, reads as the predicate that it is, whatever the lengths."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from compiled import compiled
from mask_cases import (
    CASES,
    LEFT,
    B,
    Case,
    D,
    H,
    N,
    block_diagonal,
    chunked,
    documents_of_positions,
    lookahead,
    offset_constant,
    offset_positions,
    offset_tensor,
    padding_and_causal,
    padding_lengths,
    prefix_lengths,
    qkv,
    window,
    window_to_both_sides,
)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_read(case, dynamic):
    report, _ = compiled(case.function, *qkv(case.keys, case.queries), *case.more, lengths=(0, 2) if dynamic else ())
    assert report.missed == []
    (site,) = report.sites
    assert site.predicate == ((dynamic and case.dynamic) or case.predicate)
    assert site.score == case.score
    if not dynamic:  # with two lengths of which nothing is known there may be rows beyond all keys
        assert site.empty_rows == case.empty_rows


def counted(function, backend: str):
    """(compiled function, list that grows by one for every graph that is compiled)."""
    from effattn.compiler.backend import effattn

    graphs: list[int] = []

    def compile_graph(gm, example_inputs):
        graphs.append(len(gm.graph.nodes))
        if backend == "eager":
            return gm.forward
        return effattn(gm, example_inputs, options={"rest": "eager", "strict": True})

    torch._dynamo.reset()
    return torch.compile(function, backend=compile_graph), graphs


def with_lengths(case: Case, batch: int, queries: int, keys: int):
    """Arguments of a case at other lengths."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, H, length, D, generator=generator) for length in (queries, keys, keys))
    more = []
    for value in case.more:
        sizes = [{B: batch, N: keys, 5: queries}.get(size, size) for size in value.shape]
        if value.dim() == 1 and sizes[0] == keys and case.function is offset_positions:
            sizes[0] = queries
        index = [torch.arange(size) % old for size, old in zip(sizes, value.shape, strict=True)]
        more.append(value[torch.meshgrid(*index, indexing="ij")] if index else value)
    return q, k, v, *more


SYMBOLIC = [window, offset_constant, offset_tensor, prefix_lengths, chunked, padding_and_causal, documents_of_positions]


@pytest.mark.parametrize("function", SYMBOLIC, ids=lambda function: function.__name__)
def test_one_graph_serves_all_lengths(function):
    (case,) = [case for case in CASES if case.function is function]
    runs = {}
    for backend in ("eager", "effattn"):
        fast, graphs = counted(function, backend)
        for batch, queries, keys in ((2, 17, 17), (3, 33, 33), (4, 64, 64), (5, 12, 12), (2, 7, 29), (3, 9, 40)):
            if queries != keys and "offset" not in function.__name__:
                continue
            args = with_lengths(case, batch, queries, keys)
            assert_close(fast(*args), function(*args))
        runs[backend] = graphs
    assert len(runs["effattn"]) == len(runs["eager"]), "no guard of ours"
    assert len(runs["effattn"]) <= 3


POSITIONS = [
    (window, {}, "q"),
    (offset_constant, {"queries": 5}, "14 + q"),
    (offset_tensor, {"queries": 5, "more": (torch.tensor(14),)}, "q + offset"),
    (offset_tensor, {"queries": 1, "more": (torch.tensor(14),)}, "q + offset"),
    (padding_and_causal, {"more": (LEFT,)}, "q"),
    (window_to_both_sides, {}, None),
    (lookahead, {}, None),
    (block_diagonal, {}, None),
    (padding_lengths, {"more": (torch.tensor([N, 11]),)}, None),
]


@pytest.mark.parametrize(
    ("function", "options", "position"), POSITIONS, ids=lambda value: getattr(value, "__name__", "")
)
def test_position_of_a_query_among_the_keys(function, options, position):
    """Forms that measure distances need it; a row that sees what comes after it has none."""
    from effattn.compiler.report import collect
    from effattn.ir.text import text

    more = options.get("more", ())
    with collect.listening() as heard:
        compiled(function, *qkv(N, options.get("queries", N)), *more)
    (choice,) = heard.choices
    found = choice.match.site.position
    assert (found if found is None else text(found)) == position
