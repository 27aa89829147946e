"""The coverage table of the documentation, from what the zoo found.

python -m tests.zoo.coverage tests/zoo/results.jsonl --out docs/coverage.md
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from results import EVERY, PATH, Row, read
from settings import SETTINGS
from trial import ATTENTIONS, Trial

HEAD = """# TopP

Made by `make zoo`; do not edit. Architectures of transformers that our rules make small enough for a CPU and for which
arguments are found, with random weights in float32, compiled on a CPU ({runs}).

*Sites* are the attentions that an uncompiled run was seen to execute (SDPA calls, and softmaxes whose result is
multiplied with another tensor), counted without the backend; in a setting with a cache those of the prefill and of all
steps. *Found* are those that the backend read and rewrote, or left to SDPA's own kernels because they have no mask;
*refused* those that it left alone, with the reason. *Difference* is the largest one of all outputs to the uncompiled
model, over the largest value; whole numbers, such as generated tokens, have to be equal. A trial is *wrong* if the
outputs differ by more than the model's own sensitivity to rounding, if an exception was raised, or if an attention was
neither found nor refused. A model that computes something else when `torch.compile` traces it, even with backend
"eager", is held against that.

*Inductor* is how many of the same attentions the patterns of Inductor's own `fuse_attention` pass replace in the same
graphs, its counter after its joint graph passes. With `attn_implementation="sdpa"` nothing is left for them to do, so
that only "eager" is counted.
"""
WRONG = ("differs", "error", "unseen")
ORDER = {key: at for at, key in enumerate((setting, one) for setting in SETTINGS for one in ATTENTIONS)}


def page(rows: list[Row]) -> str:
    by_name: dict[str, list[Trial]] = defaultdict(list)
    trials = [Trial.of({key: value for key, value in row.items() if key != "run"}) for row in rows]
    for trial in trials:
        # what failed before its attentions were counted is shown as well
        if trial.error or (not trial.not_run and trial.sites):
            by_name[trial.name].append(trial)
    ran = [trial for of_one in by_name.values() for trial in of_one]
    lines = [HEAD.format(runs=_runs(rows)), _sentence(trials, by_name), "", "## By setting", "", *_by_setting(trials)]
    lines += ["", "## By architecture", ""]
    lines += [
        "Sites, found and Inductor are those of one forward with eager attention (SDPA where that was not tried); the",
        "other columns are of all trials.",
        "",
    ]
    lines += ["| architecture | sites | found | Inductor | predicates | form | trials right | difference | not found |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [_line(name, sorted(of_one, key=_order)) for name, of_one in sorted(by_name.items())]
    lines += ["", "## Why attentions were refused", "", *_reasons(ran)]
    lines += ["", "## Other outputs when traced", "", *_traced(ran)]
    lines += ["", "## Not run", "", *_not_run(trials), ""]
    return "\n".join(lines)


def _runs(rows: list[Row]) -> str:
    """The versions of the trials, and on which days they were made."""
    days: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        run = row.get("run", {})
        days[f"transformers {run.get('transformers')}, torch {run.get('torch')}"].add(str(run.get("date"))[:10])
    return "; ".join(f"{versions}: {', '.join(sorted(of_one))}" for versions, of_one in sorted(days.items()))


def _sentence(trials: list[Trial], by_name: dict[str, list[Trial]]) -> str:
    names = {trial.name for trial in trials}
    right = [name for name, of_one in by_name.items() if all(trial.verdict == "right" for trial in of_one)]
    forwards = [_forward(of_one) for of_one in by_name.values()]
    sites, found = sum(one.sites for one in forwards), sum(one.found_softmaxes for one in forwards)
    counted = [one for one in forwards if one.attention == "eager" and one.inductor is not None]
    inductor, of = sum(one.inductor or 0 for one in counted), sum(one.sites for one in counted)
    return (
        f"{len(by_name)} of {len(names)} architectures ran and have attention; in {len(right)} every attention was "
        f"found in every trial. In one forward of each there are {sites} attentions, of which {found} "
        f"({_share(found, sites)}) were found. Inductor's patterns, counted in {len(counted)} architectures, replace "
        f"{inductor} of {of} ({_share(inductor, of)})."
    )


def _by_setting(trials: list[Trial]) -> list[str]:
    groups: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.setting != EVERY:
            groups[trial.setting, trial.attention].append(trial)
    lines = ["| setting | attention | trials | attentions | found | refused | Inductor | wrong | not run |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for (setting, attention), of_one in sorted(groups.items(), key=lambda item: ORDER[item[0]]):
        ran = [trial for trial in of_one if not trial.not_run]
        sites, refused = sum(one.sites for one in ran), sum(one.refused for one in ran)
        found = sum(one.found_softmaxes for one in ran)
        counted = [one for one in ran if one.inductor is not None and attention == "eager"]
        inductor = (
            f"{sum(one.inductor or 0 for one in counted)} of {sum(one.sites for one in counted)}" if counted else ""
        )
        wrong = sum(one.verdict in WRONG for one in ran)
        texts = [SETTINGS[setting].text, attention, len(ran), sites, f"{found} ({_share(found, sites)})"]
        lines.append(_cells([*texts, refused, inductor, wrong, len(of_one) - len(ran)]))
    return lines


def _line(name: str, trials: list[Trial]) -> str:
    predicates = Counter(text for trial in trials for text in trial.predicates)
    shown = ", ".join(f"`{text.replace('|', chr(92) + '|')}`" for text, _ in predicates.most_common(4))
    shown += ", ..." if len(predicates) > 4 else ""
    forms = sorted({form for trial in trials for form in trial.forms})
    apart = [trial.difference if trial.of_graphs is None else trial.of_graphs for trial in trials]
    worst = max((one for one in apart if one is not None), default=None)
    right = sum(trial.verdict == "right" for trial in trials)
    difference = "" if worst is None else f"{worst:.1e}"
    forward = _forward(trials)
    inductor = forward.inductor if forward.attention == "eager" else None
    missed = list(dict.fromkeys(text for trial in trials for text in _misses(trial)))
    texts = [
        name,
        forward.sites,
        forward.found_softmaxes,
        "" if inductor is None else inductor,
        shown,
        ", ".join(forms),
    ]
    return _cells([*texts, f"{right} of {len(trials)}", difference, "; ".join(missed).replace("|", "\\|")[:300]])


def _misses(trial: Trial) -> list[str]:
    where = f"{trial.attention}, {trial.setting}: "
    if trial.verdict in WRONG:
        return [where + (trial.error or trial.verdict)]
    return [reason.split(" x ", 1)[1] for reason in trial.reasons]


def _forward(trials: Iterable[Trial]) -> Trial:
    """The trial of one forward: with eager attention and without padding, or what is nearest to it."""
    return min(trials, key=_order)


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"


def _order(trial: Trial) -> int:
    return ORDER[trial.setting, trial.attention]


def _reasons(trials: list[Trial]) -> list[str]:
    who: dict[str, set[str]] = defaultdict(set)
    for trial in trials:
        for reason in trial.reasons:
            who[reason.split(" x ", 1)[1]].add(trial.name)
    ordered = sorted(who.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"- {reason}: {', '.join(sorted(names))}" for reason, names in ordered] or ["None was."]


def _traced(trials: list[Trial]) -> list[str]:
    """Models that differ from themselves under any backend of torch.compile."""
    lines = [
        f"- {trial.name} ({trial.attention}, {trial.setting}): {trial.difference:.1e}"
        for trial in trials
        if trial.of_graphs is not None and trial.verdict != "differs"
    ]
    return lines or ["None has."]


def _not_run(trials: list[Trial]) -> list[str]:
    """Reasons with how many trials they have; what transformers says about one architecture goes into one row."""
    reasons = Counter(_kind(trial.not_run) for trial in trials if trial.not_run)
    return [f"- {count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])]


def _kind(reason: str) -> str:
    """A reason without what it says of a single architecture."""
    if "does not support an attention implementation" in reason:
        return "transformers has no such attention for the architecture"
    if "million parameters" in reason:
        return "not made small enough by our rules"
    if reason.startswith("uncompiled: "):
        return "the uncompiled model raises an exception in this setting"
    if "Error" in reason or reason.startswith("no arguments"):
        return "not built, or no arguments found that its forward takes"
    return reason


def _cells(values: list) -> str:
    return f"| {' | '.join(map(str, values))} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=pathlib.Path, nargs="*", default=[PATH], help="lines of JSON, the oldest first")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/coverage.md"))
    options = parser.parse_args(argv)
    options.out.write_text(page(read(*options.results)), encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
