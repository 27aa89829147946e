"""The pass manager: each pass alone, in order, with what it changed; one pipeline for all who look for sites."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import effattn
from effattn.compiler import pass_manager, pipeline
from effattn.compiler.capture import Tapped
from effattn.compiler.options import Options
from effattn.passes.compilation import Compilation, Pass
from effattn.policy import Policy


class Heads(torch.nn.Module):
    """Causal attention whose mask is a buffer, checkpointed, of which a difference of two softmaxes is taken."""

    def __init__(self, checkpointed: bool):
        super().__init__()
        self.checkpointed = checkpointed
        self.register_buffer("bias", torch.ones(32, 32, dtype=torch.bool).tril())
        self.mix = torch.nn.Linear(16, 16)

    def attend(self, x):
        q, k, v = (self.mix(x).unflatten(-1, (2, 8)).transpose(1, 2) * n for n in (1, 2, 3))
        length = x.shape[1]
        mask = self.bias[:length, :length]
        one, two = ((n * q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) for n in (0.1, 0.2))
        return (one - 0.5 * two) @ v

    def forward(self, x):
        if self.checkpointed:
            return torch.utils.checkpoint.checkpoint(self.attend, x, use_reentrant=False)
        return self.attend(x)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_who_observes_sees_what_the_backend_replaces(checkpointed):
    model, x = Heads(checkpointed), torch.randn(1, 9, 16)
    sites = effattn.explain(model, x).sites
    assert len(sites) == 2
    assert {site.predicate for site in sites} == {"k <= q"}
    seen = []
    torch._dynamo.reset()
    tapped = Tapped(model)
    assert tapped.run(lambda captured: seen.append(captured.site), x) == 2
    assert tapped.missed == []
    assert {str(site.spec.predicate) for site in seen} == {"k <= q"}
    assert all(site.spec.captures == () for site in seen)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_verify_sees_what_the_backend_replaces(checkpointed):
    model, x = Heads(checkpointed), torch.randn(1, 9, 16)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="effattn", options={"rest": "eager", "verify": True, "strict": True})
    torch.testing.assert_close(fast(x), model(x))


def test_observing_changes_nothing():
    model, x = Heads(False), torch.randn(1, 9, 16)
    expected, graphs = model(x), []

    def backend(gm, inputs):
        outcome = pipeline.observe_sites(gm, lambda *args: None, inputs)
        graphs.append((gm, outcome))
        return gm.forward

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), expected)
    ((gm, outcome),) = graphs
    assert len(outcome.matches) == 2
    assert not any("effattn" in str(node.target) and "attend" in str(node.target) for node in gm.graph.nodes)


def test_the_report_has_what_each_pass_did():
    report = effattn.explain(Heads(True), torch.randn(1, 9, 16), options={"trace": True})
    (graph,) = report.graphs
    names = [record.name for record in graph.passes]
    assert names[: len(pipeline.CANONICALIZE)] == [one.name for one in pipeline.CANONICALIZE]
    assert names[-1] == "undo: inline checkpoints"
    by_name = {record.name: record for record in graph.passes}
    assert by_name["rewrite sites"].changed
    assert "+" in by_name["rewrite sites"].difference
    assert "scaled_dot_product_attention" in by_name["rewrite sites"].difference
    assert not by_name["match attention"].changed
    assert not by_name["match attention"].difference


def test_differences_are_kept_on_request_only():
    (graph,) = effattn.explain(Heads(False), torch.randn(1, 9, 16)).graphs
    assert graph.passes
    assert not any(record.difference for record in graph.passes)


@pytest.mark.parametrize("passes", [pipeline.CANONICALIZE[:n] for n in range(1, len(pipeline.CANONICALIZE) + 1)])
def test_passes_without_replacement_leave_the_graph_as_it_was(passes):
    """Whatever is decomposed is put back when no site was replaced."""
    codes = []

    def backend(gm, inputs):
        before = gm.graph.python_code("self").src
        pass_manager.run(passes, Compilation(gm, Policy.of(None), inputs, strict=True))
        codes.append((before, gm.graph.python_code("self").src))
        return gm.forward

    torch._dynamo.reset()
    model, x = Heads(True), torch.randn(1, 9, 16)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    ((before, after),) = codes
    assert before == after


class Breaks(Pass):
    name = "break"
    optional = True

    def apply(self, work):
        for node in work.graph.nodes:
            if node.op == "call_function":
                node.replace_all_uses_with(node.args[0])
                break
        raise ValueError("in the middle")


@pytest.mark.parametrize("strict", [False, True])
def test_a_pass_that_fails_in_the_middle_leaves_nothing_behind(strict):
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    before = gm.graph.python_code("self").src
    work = Compilation(gm, Policy.of(None), strict=strict)
    if strict:
        with pytest.raises(ValueError, match="in the middle"):
            pass_manager.run((Breaks,), work)
    else:
        outcome = pass_manager.run((Breaks,), work)
        assert [missed.name for missed in outcome.missed] == ["break"]
    assert gm.graph.python_code("self").src == before


def test_a_pass_needs_others_before_it():
    gm = fx.symbolic_trace(lambda x: x.softmax(-1))
    with pytest.raises(AssertionError, match="choose forms needs matches before it"):
        pass_manager.run(pipeline.REPLACE, Compilation(gm, Policy.of(None)))


def test_the_earlier_name_of_the_inner_backend_goes_on_working():
    assert Options.read({"rest": "eager"}) == Options.read({"inner_backend": "eager"})
    with pytest.raises(effattn.OptionError, match="'rest' is the earlier name of 'inner_backend'"):
        Options.read({"rest": "eager", "inner_backend": "eager"})
    with pytest.raises(effattn.OptionError, match="inner_backend='eagre'; allowed: 'inductor', 'eager'"):
        Options.read({"rest": "eagre"})


def test_every_pass_has_its_own_name_and_options_default_to_no_trace():
    passes = (*pipeline.CANONICALIZE, *pipeline.MATCH, *pipeline.REPLACE)
    assert len({one.name for one in passes}) == len(passes)
    assert not Options.read(None).trace
