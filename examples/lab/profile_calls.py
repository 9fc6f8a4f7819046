"""Where the time and the memory of a call go: phases, decoder layers, and memory at its peak.

    PYTHONPATH=. python examples/lab/profile_calls.py --lengths 4096 --threads 1 --out profile.md

Takes what ``lengths.py`` takes, and writes two tables more into ``--out``, of the longest prompts. Layers are
timed by hooks until the first new token; rows are tokens that leave a layer, summed over layers and passes, and
outside the layers is all the rest of TTFT. The compute limit is the time that a prefill would take if time shrank as
compute does. Peak growth is by how much a call's peak exceeds what was in use before it (on CUDA what PyTorch's
allocator gave out; on a Linux CPU resident memory), and is measured in the untimed round.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from statistics import median
from typing import Any

import lengths
from lengths import UNTIMED, split_name
from probes import CallProbe, LayerUse
from semsharekv_integrations.lab.figures import Outcome
from semsharekv_integrations.lab.policies import FULL
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.scenarios import Case

LAYER_COLUMNS = (
    *("scenario", "policy", "rows of off's", "time of off's", "all layers, ms", "first layer, ms", "median layer, ms"),
    *("last layer, ms", "outside the layers, ms", "peak growth, MB"),
)
PREFILL = ("gather", "attend", "forward")  # the phases of a prefill that compute
Groups = Mapping[tuple[str, str], Sequence[Outcome]]


def group_calls(outcomes: Iterable[Outcome]) -> Groups:
    """Calls by scenario and policy."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.scenario, outcome.policy), []).append(outcome)
    return groups


def phases_of(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Median seconds by phase over timed rounds, in the order in which phases first come."""
    timed = [outcome.report.phases_s for outcome in outcomes if outcome.case != UNTIMED]
    names = dict.fromkeys(name for phases in timed for name in phases)
    return {name: median(phases.get(name, 0.0) for phases in timed) for name in names}


def layers_of(outcomes: Iterable[Outcome]) -> tuple[list[float], list[float]]:
    """Median seconds, and rows, of each decoder layer over timed rounds; empty if there was no clock."""
    timed = [outcome.extra.get("layers", ()) for outcome in outcomes if outcome.case != UNTIMED]
    by_layer = [[LayerUse(*use) for use in uses] for uses in zip(*timed, strict=True)]  # plain from a journal
    return (
        [median(use.seconds for use in uses) for uses in by_layer],
        [float(median(use.rows for use in uses)) for uses in by_layer],
    )


def find_limit_share(own: Sequence[Outcome], full: Sequence[Outcome]) -> float | None:
    """How near a prefill comes to the time that its share of the compute allows: 1 if time shrinks as compute does.

    That is the median time of a full prefill over its own, times its share of the compute. Looking up, rendering and
    decoding are not in it.
    """
    times = [sum(phases_of(each).get(name, 0.0) for name in PREFILL) for each in (full, own)]
    ratios = [each.report.compute_ratio for each in own if each.case != UNTIMED]
    return times[0] / times[1] * median(ratios) if all(times) and ratios else None


def make_phase_table(groups: Groups) -> str:
    """Median milliseconds, and how near the prefill comes to its limit."""
    found = {key: phases_of(group) for key, group in groups.items()}
    names = list(dict.fromkeys(name for phases in found.values() for name in phases))
    rows = []
    for key, phases in found.items():
        share = find_limit_share(groups[key], groups.get((key[0], FULL), ()))
        shown = "-" if share is None else f"{share:.2f}"
        if phases:
            rows.append([*key, *(_show_ms(phases.get(name)) for name in names), shown])
    return _make_table(("scenario", "policy", *names, "of the compute limit"), rows)


def make_layer_table(groups: Groups) -> str:
    """A line for each scenario and policy."""
    return _make_table(LAYER_COLUMNS, (_show_layers(key, groups) for key in groups))


def _show_layers(key: tuple[str, str], groups: Groups) -> list[str]:
    seconds, rows = layers_of(groups[key])
    full_s, full_rows = layers_of(groups.get((key[0], FULL), ()))
    peak = next((f"{o.extra['peak_bytes'] / 1e6:.1f}" for o in groups[key] if "peak_bytes" in o.extra), "-")
    if not seconds or not sum(full_rows):
        return [*key, *["-"] * (len(LAYER_COLUMNS) - len(key) - 1), peak]
    ttft = median(outcome.report.ttft_s for outcome in groups[key] if outcome.case != UNTIMED)
    times = (sum(seconds), seconds[0], median(seconds), seconds[-1], ttft - sum(seconds))
    shares = (sum(rows) / sum(full_rows), sum(seconds) / sum(full_s))
    return [*key, *(f"{share:.3f}" for share in shares), *map(_show_ms, times), peak]


def _show_ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _make_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure with the probe around every call."""
    args = lengths.parse(__doc__ or "", arguments)
    study, subject = lengths.prepare(args)
    rounds, probe = lengths.count_rounds(args), CallProbe(subject)

    def watch(case: Case, policy: str, index: int) -> AbstractContextManager[dict[str, Any]]:
        return probe.watch(case, policy, index % rounds)

    outcomes = run_study(replace(study, watch=watch), subject, args).outcomes
    longest = max((split_name(outcome.scenario)[1] or 0 for outcome in outcomes), default=0)
    groups = group_calls(
        replace(outcome, scenario=name, case=outcome.case % rounds)
        for outcome in outcomes
        for name, length in [split_name(outcome.scenario)]
        if (length or 0) == longest
    )
    tables = f"## Phases\n\n{make_phase_table(groups)}\n\n## Decoder layers\n\n{make_layer_table(groups)}\n"
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(f"\n{tables}")
    else:
        print(tables)


if __name__ == "__main__":
    sys.exit(main())
