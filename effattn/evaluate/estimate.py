"""A rough estimate of the running time from two short runs: a forward takes a * N + b * N^2, a site c * N^2."""

from __future__ import annotations

from dataclasses import dataclass

from effattn.evaluate.records import Looked
from effattn.evaluate.setting import Setting
from effattn.evaluate.tasks.passkey import ANSWER_TOKENS

GRAPHS = 3  # compiled per policy: prefill without a cache, prefill into one, decode
INDUCTOR = 6.0  # compile time with Inductor, relative to the passes alone
DECODED = 4  # cost of decoding an answer, in short forwards


@dataclass(frozen=True)
class Estimate:
    """Seconds per kind of work."""

    looked: Looked
    setting: Setting

    def forward(self, length: int) -> float:
        short, one = self.looked.short, self.looked.short_seconds
        long, two = self.looked.long, self.looked.long_seconds
        if long <= short:
            return two * length / max(long, 1)
        per_token = one / short
        square = max(0.0, (two / long - per_token) / (long - short))
        line = max(per_token - square * short, 0.1 * per_token)
        return line * length + square * length * length

    def site(self, length: int) -> float:
        return self.looked.site_seconds * (length / self.looked.long) ** 2

    def errors(self, length: int) -> float:
        return self.forward(length) + self.looked.sites * self.site(length)

    def perplexity(self, length: int) -> float:
        return self.forward(length)

    def time(self, length: int) -> float:
        return self.forward(length) * (1 + self.setting.repeats)

    def passkey(self, length: int) -> float:
        return self.forward(length) + DECODED * ANSWER_TOKENS * self.looked.short_seconds / self.looked.short

    def compilation(self) -> float:
        return GRAPHS * self.looked.compilation * (INDUCTOR if self.setting.rest == "inductor" else 1.0)

    def total(self) -> float:
        """The estimate for the whole evaluation, including finished pieces."""
        setting, total = self.setting, 0.0
        bodies = 1 + len(setting.policies)
        times = {"perplexity": setting.segments, "time": 1, "passkey": setting.trials * len(setting.depths)}
        for length in setting.lengths:
            total += self.errors(length) if "errors" in setting.tasks else 0.0
            for task, count in times.items():
                total += bodies * count * getattr(self, task)(length) if task in setting.tasks else 0.0
        compiled = any(task in setting.tasks for task in times)
        return total + (len(setting.policies) * self.compilation() if compiled else 0.0)
