"""``evaluate``: runs all tasks in order. Each finished piece is stored at once and not repeated."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effattn.errors import EvaluationError
from effattn.evaluate.bodies import body_of, forget, quiet
from effattn.evaluate.estimate import Estimate
from effattn.evaluate.evaluation import Evaluation
from effattn.evaluate.layers import Layers
from effattn.evaluate.records import PasskeyAnswer, PrefillTime, Record, TextLoss
from effattn.evaluate.rope import scaled
from effattn.evaluate.setting import DENSE, TASKS, PolicySource, Setting
from effattn.evaluate.show.progress import Shown, Silent, duration
from effattn.evaluate.store import PICTURE, RESULTS, Store, write_json
from effattn.evaluate.subject import Subject
from effattn.evaluate.tasks import passkey as keys
from effattn.evaluate.tasks.clock import timed, wait
from effattn.evaluate.tasks.perplexity import perplexity
from effattn.evaluate.text import LongText, long_text
from effattn.lowering.device import device_type
from effattn.policy import Policy
from effattn.runtime.machine import memory_statistics

GIB = 1 << 30


def evaluate(
    model: Any,
    tokenizer: Any = None,
    policies: Iterable[PolicySource] = ("exact", "power", "window"),
    *,
    lengths: Sequence[int] = (2048,),
    tasks: Sequence[str] = TASKS,
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    trials: int = 5,
    segments: int = 1,
    repeats: int = 2,
    text: str | os.PathLike | Tensor | None = None,
    rope_scaling: str | None = None,
    rest: str | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    name: str | None = None,
    progress: Silent | bool = False,
) -> Evaluation:
    """Compare policies with the dense model: errors by layer, perplexity, passkey retrieval, time.

    Args:
        model: a transformers causal language model, on the device and in the dtype to run in. It is not changed, but
            ``torch._dynamo.reset`` discards what torch.compile has compiled in this process.
        tokenizer: its tokenizer; not needed if ``text`` is token ids and there is no passkey task.
        policies: names of shipped policies, files, dicts or policies, with distinct names.
        lengths: tokens; for passkeys, of prompt and answer together.
        tasks: of "errors", "perplexity", "passkey", "time".
        depths: positions of the passkey: 0 is the start of the text, 1 its end.
        trials: passkeys per length and depth.
        segments: texts per length for perplexity.
        repeats: timed forwards after the first.
        text: a file, token ids int64 [1, N], or None for the source of Python's standard library.
        rope_scaling: such as "yarn:16", for lengths beyond the model's context.
        rest: what compiles the rest of the graph, "inductor" or "eager"; None: Inductor on a GPU, else eager.
        seed: of the passkeys.
        out: a folder for the results, a JSON file and a picture. A second call with the same arguments resumes there.
        name: the model's name in tables.
        progress: True shows a progress bar and messages on standard error.

    Returns:
        All results; ``print`` them, or see :class:`effattn.evaluate.evaluation.Evaluation`.

    Raises:
        EvaluationError: an argument is invalid or does not fit the model, or the folder holds other files.
        PolicyError: a policy is invalid or names layers that the model does not have.
    """
    subject = Subject.of(model, tokenizer, name)
    setting = Setting.read(
        policies,
        lengths=tuple(lengths),
        tasks=tuple(tasks),
        depths=tuple(depths),
        trials=trials,
        segments=segments,
        repeats=repeats,
        rest=rest or device_type(subject.device.type).inner_backend,
        seed=seed,
        rope_scaling=rope_scaling,
    )
    subject.check(setting)
    tell = progress if isinstance(progress, Silent) else Shown() if progress else Silent()
    training = model.training
    tokens = max(setting.lengths) * setting.segments
    given = long_text(text, tokenizer, tokens, subject.vocabulary)
    if "passkey" in setting.tasks:
        keys.passkey(tokenizer, min(setting.lengths), 0.5, 0)  # raises at once if the length is too short
    try:
        with quiet(), scaled(model, setting.rope), torch.no_grad(), tell:
            return _Work(replace(subject, model=model.eval()), setting, given, out, tell).all()
    finally:
        model.train(training)


class _Work:
    """One evaluation."""

    def __init__(self, subject: Subject, setting: Setting, text: LongText, out: Any, tell: Silent):
        self.subject, self.setting, self.tell = subject, setting, tell
        self.text = replace(text, ids=text.ids.to(subject.device))
        facts = {"model": subject.facts, "text": text.to_dict(), **subject.machine(), **setting.to_dict()}
        self.store = Store(out, facts, tell.say)
        self.records: list[Record] = []
        self.layers = Layers(subject, setting, self.store, tell)

    def all(self) -> Evaluation:
        start = time.perf_counter()
        self.tell.work("looking at the model's attention")
        if "perplexity" in self.setting.tasks:
            self.subject.check_head(self.text.segment(min(16, *self.setting.lengths)))
        self.looked = self.layers.look(self.text)
        for note in self.looked.notes:
            self.tell.say(note)
        self.estimate = Estimate(self.looked, self.setting)
        total = self.estimate.total()
        self.tell.say(f"the whole evaluation takes about {duration(total)} on this machine, finished parts included")
        self.tell.begin(total)
        if "errors" in self.setting.tasks:
            for length in self.setting.lengths:
                self.records += self.layers.errors(self.text, length, self.estimate)
        forget()
        policies: list[Policy | None] = [None, *self.setting.policies]
        for number, policy in enumerate(policies):
            self._under(policy, number)
        return self._finish(time.perf_counter() - start)

    def _under(self, policy: Policy | None, number: int) -> None:
        """Run all tasks on the whole model, under one policy or dense."""
        who = DENSE if policy is None else policy.name
        slug = DENSE if policy is None else f"policy{number - 1}"
        with body_of(self.subject.model, policy, self.setting.rest) as body:
            for length in self.setting.lengths:
                self._tasks(body, who, slug, length)
        if policy is not None:
            self.tell.done(self.estimate.compilation())

    def _tasks(self, body: Callable[..., Any], who: str, slug: str, length: int) -> None:
        setting, estimate = self.setting, self.estimate
        if "perplexity" in setting.tasks:
            for segment in range(setting.segments):
                self._piece(
                    f"perplexity-{length}-{slug}-{segment}",
                    f"{who}: perplexity of {length:,} tokens",
                    TextLoss,
                    partial(self._perplexity, body, who, length, segment),
                    estimate.perplexity(length),
                )
        if "time" in setting.tasks:
            self._piece(
                f"time-{length}-{slug}",
                f"{who}: time of {length:,} tokens",
                PrefillTime,
                partial(self._time, body, who, length),
                estimate.time(length),
            )
        if "passkey" in setting.tasks:
            for place, depth in enumerate(setting.depths):
                for trial in range(setting.trials):
                    self._piece(
                        f"passkey-{length}-{slug}-{place}-{trial}",
                        f"{who}: passkey in {length:,} tokens at depth {depth:g}",
                        PasskeyAnswer,
                        partial(self._passkey, body, who, length, depth, trial),
                        estimate.passkey(length),
                    )

    def _piece(self, name: str, text: str, kind: type[Record], measure: Callable[[], Record], seconds: float) -> None:
        """Get a result from the store, or measure and store it."""
        record = self.store.get(name, kind)
        if record is None:
            self.tell.work(text)
            record = measure()
            self.store.put(name, record)
        self.records.append(record)
        self.tell.done(seconds)

    def _perplexity(self, body: Callable[..., Any], who: str, length: int, segment: int) -> TextLoss:
        found = perplexity(self.subject.model, self.text.segment(length, segment), body)
        return TextLoss(
            length=length, policy=who, segment=segment, loss=found.loss, tokens=found.tokens, seconds=found.seconds
        )

    def _time(self, body: Callable[..., Any], who: str, length: int) -> PrefillTime:
        ids = self.text.segment(length)
        memory = memory_statistics(ids.device)
        first = timed(lambda: body(ids, use_cache=False), 0).first
        if memory is not None:
            memory.reset_peak_memory_stats(ids.device)
        later = [timed(lambda: body(ids, use_cache=False), 0).first for _ in range(self.setting.repeats)]
        peak = None if memory is None else memory.max_memory_allocated(ids.device) / GIB
        return PrefillTime(length=length, policy=who, first=first, later=later, peak_gib=peak)

    def _passkey(self, body: Callable[..., Any], who: str, length: int, depth: float, trial: int) -> PasskeyAnswer:
        subject, tokenizer = self.subject, self.subject.tokenizer
        prompt = keys.passkey(tokenizer, length, depth, trial, self.setting.seed)
        wait()
        start = time.perf_counter()
        text = keys.answer(body, subject.head, tokenizer, prompt.ids.to(subject.device), subject.cache)
        return PasskeyAnswer(
            length=length,
            policy=who,
            depth=float(depth),
            trial=trial,
            tokens=prompt.ids.shape[1],
            key=prompt.key,
            answer=text,
            found=keys.retrieved(prompt.key, text),
            seconds=time.perf_counter() - start,
        )

    def _finish(self, seconds: float) -> Evaluation:
        store = self.store
        about = {**store.setting, "date": datetime.date.today().isoformat(), "seconds": round(seconds, 1)}
        done = Evaluation.of(about, self.looked, self.records)
        if store.reused:
            self.tell.say(f"{store.reused} finished pieces were read from {store.folder}")
        if store.folder is not None:
            try:
                write_json(store.folder / RESULTS, done.to_dict())
                if (missing := done.picture(store.folder / PICTURE)) is not None:
                    self.tell.say(missing)
            except OSError as error:
                raise EvaluationError(f"cannot write into {store.folder}: {error.strerror}") from error
            self.tell.say(f"wrote {store.folder / RESULTS}")
        return done
