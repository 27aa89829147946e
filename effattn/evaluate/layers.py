"""Errors by layer: the dense model runs once per length, and every attention is measured when it is reached."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from effattn.compiler.capture import Captured, Tapped
from effattn.errors import EvaluationError, FormRefused
from effattn.evaluate.estimate import Estimate
from effattn.evaluate.records import Density, ErrorsDone, FormAtSite, Looked, Record, SiteErrors
from effattn.evaluate.setting import Setting
from effattn.evaluate.show.progress import Silent
from effattn.evaluate.store import Store
from effattn.evaluate.subject import Subject
from effattn.evaluate.tasks.clock import wait
from effattn.evaluate.tasks.density import kept_pairs
from effattn.evaluate.tasks.kept import is_static
from effattn.evaluate.tasks.site_errors import Lowered, lower, site_errors
from effattn.evaluate.text import LongText
from effattn.ir.plan import Plan
from effattn.ir.site import Op
from effattn.passes.choose.choice import choose

SHORT, LONG = 128, 1024  # tokens of the runs for the time estimate


class Layers:
    """Inspects and measures the attentions of one model through one compiled, tapped copy of its layers."""

    def __init__(self, subject: Subject, setting: Setting, store: Store, tell: Silent):
        self.subject, self.setting, self.store, self.tell = subject, setting, store, tell
        self.tapped = Tapped(subject.model.base_model)

    def look(self, text: LongText) -> Looked:
        """Run a short text to find the attentions, their forms under each policy, and a time estimate.

        Raises:
            EvaluationError: no attention was found.
        """
        looked = self.store.get("look", Looked)
        if looked is None:
            looked = self._look(text)
            self.store.put("look", looked)
        return looked

    def _look(self, text: LongText) -> Looked:
        plans: list[list[Lowered]] = [[] for _ in self.setting.policies]
        seconds: float | None = None
        linear = 0

        def receive(captured: Captured) -> None:
            nonlocal linear
            if captured.site.op is not Op.SOFTMAX:
                linear += 1
                return
            for number, policy in enumerate(self.setting.policies):
                plans[number].append(lower(captured, policy))

        def only_first(captured: Captured) -> None:
            nonlocal seconds
            if seconds is None and captured.site.op is Op.SOFTMAX:
                start = self._now()
                site_errors(captured, [lower(captured, policy) for policy in self.setting.policies])
                seconds = self._now() - start

        shortest = min(self.setting.lengths)
        long, short = min(LONG, shortest), min(SHORT, shortest // 2)
        begin = self._now()
        sites = self.tapped.run(receive, text.segment(short), use_cache=False)
        compilation = self._now() - begin
        if not sites:
            raise EvaluationError(self._nothing_found())
        body = self.subject.model.base_model
        spent = []
        for length in (short, long):
            begin = self._now()
            body(text.segment(length), use_cache=False)
            spent.append(self._now() - begin)
        if "errors" in self.setting.tasks:
            self.tapped.run(only_first, text.segment(long), use_cache=False)
        densities: list[Density] = []
        notes: list[str] = []
        for policy, found in zip(self.setting.policies, plans, strict=True):
            densities += self._densities(policy.name, found)
            notes += self._notes(policy.name, found)
        if linear:
            notes.append(f"{linear} of {sites} attentions have no softmax: no form changes them, and their error is 0")
        if self.tapped.missed:
            notes.append(f"{len(self.tapped.missed)} softmaxes are left alone: {self._left_alone()[0]}")
        return Looked(
            sites=sites,
            short=short,
            short_seconds=spent[0],
            long=long,
            long_seconds=spent[1],
            site_seconds=seconds or 0.0,
            compilation=max(compilation - spent[0], 0.0),
            densities=densities,
            notes=notes,
        )

    def errors(self, text: LongText, length: int, estimate: Estimate) -> list[Record]:
        """One record per attention in a run over ``length`` tokens. Finished records are read from the store."""
        done = self.store.get(f"errors-{length}", ErrorsDone)
        if done is not None:
            found = [self.store.get(self._name(length, number), SiteErrors) for number in range(done.sites)]
            records = [record for record in found if record is not None]
            if len(records) == done.sites:
                self.tell.done(estimate.errors(length))
                return list(records)
        self.tell.work(f"errors by layer, {length:,} tokens")
        kept: list[Record] = []

        def receive(captured: Captured) -> None:
            name = self._name(length, captured.number)
            record = self.store.get(name, SiteErrors)
            if record is None:
                self.tell.work(f"errors of attention {captured.number + 1}, {length:,} tokens")
                record = self._measure(captured, length)
                self.store.put(name, record)
            kept.append(record)
            self.tell.done(estimate.site(length))

        sites = self.tapped.run(receive, text.segment(length), use_cache=False)
        self.store.put(f"errors-{length}", ErrorsDone(length=length, sites=sites, left_alone=self._left_alone()))
        self.tell.done(estimate.forward(length))
        return kept

    def _measure(self, captured: Captured, length: int) -> SiteErrors:
        start = self._now()
        forms = (self._measured if captured.site.op is Op.SOFTMAX else self._unchanged)(captured)
        _, heads, rows, keys = captured.shape
        site = captured.site
        return SiteErrors(
            length=length,
            number=captured.number,
            layer=site.layer,
            name=site.path or site.name,
            heads=heads,
            rows=rows,
            keys=keys,
            forms=forms,
            seconds=self._now() - start,
        )

    def _unchanged(self, captured: Captured) -> list[FormAtSite]:
        """The forms at a site without a softmax: its own function under every policy."""
        chosen = [choose(captured.match, policy, strict=False, target=None) for policy in self.setting.policies]
        return [
            FormAtSite(
                policy=policy.name,
                form="linear",
                reason=choice.reason,
                error=0.0,
                mass=1.0,
                density=1.0,
                oracle_mass=1.0,
                oracle_density=1.0,
                block=1,
                mass_by_head=[1.0] * captured.shape[1],
            )
            for policy, choice in zip(self.setting.policies, chosen, strict=True)
        ]

    def _measured(self, captured: Captured) -> list[FormAtSite]:
        lowered = [lower(captured, policy) for policy in self.setting.policies]
        measured = site_errors(captured, lowered)
        return [
            FormAtSite(
                policy=policy.name,
                form=found.form,
                reason=low.reason,
                error=found.error if found.error < float("inf") else None,
                mass=found.mass,
                density=found.density,
                oracle_mass=found.oracle_mass,
                oracle_density=found.oracle_density,
                block=found.block,
                unit=found.unit,
                mass_by_head=list(found.mass_by_head),
            )
            for policy, low, found in zip(self.setting.policies, lowered, measured, strict=True)
        ]

    def _densities(self, policy: str, found: Sequence[Lowered]) -> list[Density]:
        """Densities by length, if no selector is involved at any attention."""
        densities = []
        for length in self.setting.lengths:
            known = [density for lowered in found if (density := _density(lowered.plan, length)) is not None]
            if known and len(known) == len(found):
                densities.append(Density(length=length, policy=policy, density=sum(known) / len(known)))
        return densities

    def _notes(self, policy: str, found: Sequence[Lowered]) -> list[str]:
        """Where a policy's form is refused, or starts only at greater lengths."""
        reasons = Counter(low.reason for low in found if low.form == "exact" and low.refusals)
        notes = [
            f"policy {policy!r} stays exact at {count} of {len(found)} attentions: {reason}"
            for reason, count in reasons.items()
        ]
        since = min((low.plan.dispatch.min_length for low in found if low.form != "exact"), default=0)
        dense = [f"{length:,}" for length in self.setting.lengths if length < since]
        if dense:
            notes.append(f"policy {policy!r} is exact below {since:,} keys, so at {', '.join(dense)}")
        return notes

    def _left_alone(self) -> list[str]:
        return [f"{missed.name} ({missed.location}): {missed.refusal}" for missed in self.tapped.missed]

    def _nothing_found(self) -> str:
        alone = self._left_alone()
        why = f"; softmaxes that were left alone: {'; '.join(alone[:3])}" if alone else ""
        return (
            f"no attention was found in {self.subject.name}, so there is nothing to compare{why}. See what effattn "
            "makes of the model: effattn explain"
        )

    def _now(self) -> float:
        wait()
        return time.perf_counter()

    @staticmethod
    def _name(length: int, number: int) -> str:
        return f"errors-{length}-{number:03}"


def _density(plan: Plan, length: int) -> float | None:
    """Kept pairs / allowed pairs of self-attention over ``length`` tokens; None if it depends on data."""
    plan = plan.at(length)
    if not is_static(plan):
        return None
    try:
        allowed = kept_pairs(plan.spec.predicate, length, length)
        return kept_pairs(plan.spec.rule, length, length) / allowed if allowed else 1.0
    except (FormRefused, KeyError):  # captured tensors, or a length known only at run time
        return None
