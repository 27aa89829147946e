"""The cheapest form by length, from the forms' costs and the device's rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from effattn.ir.site import Site
from effattn.lowering.cost import Cost, ladder
from effattn.lowering.device import Device, device_named
from effattn.lowering.forms import FORMS, Params
from effattn.runtime.machine import name_of

Steps = tuple[tuple[int, str], ...]  # (first number of keys, form), ascending


@dataclass(frozen=True)
class Cheapest:
    """The forms of one site by length, and their predicted times."""

    steps: Steps
    costs: Mapping[str, Cost]
    rates: Device
    site: Site

    @property
    def device(self) -> str:
        return f"{self.rates.name}, {self.rates.source} figures"

    def at(self, length: int) -> str:
        """The cheapest form with this many keys."""
        return [name for first, name in self.steps if first <= length][-1]

    def steps_from(self, length: int) -> Steps:
        """The steps, with exact attention below ``length``."""
        if length <= 1:
            return self.steps
        found = [(1, "exact"), (length, self.at(length)), *(step for step in self.steps if step[0] > length)]
        return tuple(step for i, step in enumerate(found) if i == 0 or step[1] != found[i - 1][1])

    def milliseconds(self, form: str) -> float:
        """Predicted time at the lengths for which the site was compiled."""
        sizes = self.site.hints
        return 1e3 * self.costs[form].seconds(self.rates, self.site.dtype, sizes.q_len, sizes.k_len)

    def text(self, steps: Steps) -> str:
        """For the report: where each form begins, and the predicted times."""
        parts = [f"{name} from {first:,} keys on" if first > 1 else name for first, name in steps]
        here = ", ".join(f"{name} {self.milliseconds(name):.3g} ms" for name in self.costs)
        return f"{', '.join(parts)} (predicted at {self.site.hints.k_len:,} keys: {here}; {self.device})"


def cheapest(site: Site, forms: Mapping[str, Params], dense: bool) -> Cheapest:
    """The cheapest of ``forms`` at every length. ``dense``: exact attention runs SDPA's kernels at this site."""
    rates = device_named(name_of(site.device))
    # most layers are alike; drop what does not affect costs, so that they share the result
    alike = replace(
        site, name="", layer=None, layer_count=None, path="", module_classes=(), location="", reads=(), notes=()
    )
    return _cheapest(alike, tuple(forms.items()), dense, rates)


@lru_cache(maxsize=256)
def _cheapest(site: Site, forms: tuple[tuple[str, Params], ...], dense: bool, rates: Device) -> Cheapest:
    costs = {name: FORMS[name].cost(site, params) for name, params in forms}
    if "exact" in costs and not dense:
        costs["exact"] = replace(costs["exact"], dense=False)

    def seconds(cost: Cost) -> Callable[[int], float]:
        one_step = site.stage == "decode"
        return lambda k_len: cost.seconds(rates, site.dtype, site.hints.q_len if one_step else k_len, k_len)

    # exact first, so that it wins ties
    order = sorted(costs, key=lambda name: name != "exact")
    return Cheapest(ladder({name: seconds(costs[name]) for name in order}), costs, rates, site)
