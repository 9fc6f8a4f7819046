"""Figures of speed: medians over rounds, ratios paired within a round, and the aims they are held against.

Nothing is filtered: a scenario in which reuse loses has its row like any other, and so has what could not be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np

from semsharekv_integrations.lab.policies import FULL
from semsharekv_integrations.lab.speed import UNTIMED, Failure, Sample
from semsharekv_integrations.lab.speed_policies import EXACT, RETAINED

AIM_LENGTH = 5_000  # tokens: aims are held against the longest prompts measured up to here
SPEED_AIMS: Mapping[str, float] = {  # least times faster to the first token than a full prefill, by scenario
    "next_turn": 20.0,
    "reordered": 10.0,
    "shared": 10.0,
    "reworded_10": 6.25,
    "reworded_30": 6.25,
    "reworded_50": 6.25,
}
CONTROL = "unlike"
MAX_OVERHEAD = 0.03  # of a full prefill's time, where nothing is alike
MIN_SAVED_KV = 0.42


class Spread(NamedTuple):
    """Median and quartiles."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """That of one value or more."""
        low, value, high = np.percentile(list(values), (25, 50, 75))
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True)
class Row:
    """One policy in one scenario at one length. Figures are None where there is nothing to take them from.

    Attributes:
        scenario: its name.
        length: tokens asked for.
        prompt_tokens: tokens of the prompt.
        policy: what ran.
        rounds: how many timed rounds the figures are over.
        ttft_s: time to first token.
        speedup: a full prefill's time to first token over this policy's in the same round; above 1 is faster.
        speedup_over_exact: the same, for reuse of exact prefixes alone.
        compute_ratio: share of the token-layers that was computed.
        overhead_quotient: time share of a full prefill over ``compute_ratio``; 1 is no overhead at all.
        reused_tokens: prompt tokens whose KV was not computed.
        peak_bytes: growth of memory at its peak.
        kv_bytes: of the prompt's KV after prefill.
        kv_retained_ratio: share of it kept for decoding.
        store_bytes: in the store after the call.
        store_s: seconds to put the references into the store.
        decode_tokens_per_s: new tokens a second.
        note: why it was not measured, or why nothing was reused.
    """

    scenario: str
    length: int
    prompt_tokens: int | None
    policy: str
    rounds: int = 0
    ttft_s: Spread | None = None
    speedup: Spread | None = None
    speedup_over_exact: Spread | None = None
    compute_ratio: float | None = None
    overhead_quotient: float | None = None
    reused_tokens: int | None = None
    peak_bytes: int | None = None
    kv_bytes: int | None = None
    kv_retained_ratio: float | None = None
    store_bytes: int | None = None
    store_s: float | None = None
    decode_tokens_per_s: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """One aim held against one policy.

    Attributes:
        aim: what is asked for, in words.
        policy: what ran.
        length: tokens asked for, at which it was measured.
        figure: what was measured, in words.
        met: whether that is enough.
    """

    aim: str
    policy: str
    length: int
    figure: str
    met: bool


_Key = tuple[str, int, str]  # scenario, length, policy


def summarize(samples: Sequence[Sample], failures: Sequence[Failure] = ()) -> list[Row]:
    """One row for each scenario, length and policy, grouped by scenario and ascending in length."""
    groups: dict[_Key, list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.scenario, sample.length, sample.policy), []).append(sample)
    rows = {key: _row(group, groups) for key, group in groups.items()}
    for failure in failures:
        key = (failure.scenario, failure.length, failure.policy)
        row = rows.get(key) or Row(failure.scenario, failure.length, None, failure.policy)
        rows[key] = replace(row, note=failure.reason)  # beside the figures of what was measured before
    scenarios = list(dict.fromkeys(row.scenario for row in rows.values()))
    return sorted(rows.values(), key=lambda row: (scenarios.index(row.scenario), row.length))


def _row(group: Sequence[Sample], groups: Mapping[_Key, Sequence[Sample]]) -> Row:
    first = group[0]
    timed = [sample for sample in group if sample.round != UNTIMED]
    speedup = _speedup(timed, groups.get((first.scenario, first.length, FULL), ()))
    compute = _median(sample.reading.compute_ratio for sample in timed)
    return Row(
        scenario=first.scenario,
        length=first.length,
        prompt_tokens=first.prompt_tokens,
        policy=first.policy,
        rounds=len(timed),
        ttft_s=Spread.of(sample.reading.ttft_s for sample in timed) if timed else None,
        speedup=speedup,
        speedup_over_exact=_speedup(timed, groups.get((first.scenario, first.length, EXACT), ())),
        compute_ratio=compute,
        overhead_quotient=1 / speedup.value / compute if speedup and compute else None,
        reused_tokens=timed[-1].reading.reused_tokens if timed else None,
        peak_bytes=next((s.reading.peak_bytes for s in group if s.round == UNTIMED), None),
        kv_bytes=first.reading.kv_bytes,
        kv_retained_ratio=_median(sample.reading.kv_retained_ratio for sample in timed),
        store_bytes=first.reading.store_bytes,
        store_s=_median(sample.reading.store_s for sample in timed),
        decode_tokens_per_s=_median(sample.reading.decode_tokens_per_s for sample in timed),
        note=(timed[-1].reading.declined or "") if timed else "",
    )


def _speedup(samples: Sequence[Sample], others: Sequence[Sample]) -> Spread | None:
    """How many times longer the ``others`` took, round by round; None if they have no round in common."""
    other_s = {sample.round: sample.reading.ttft_s for sample in others}
    ratios = [other_s[s.round] / s.reading.ttft_s for s in samples if s.round in other_s]
    return Spread.of(ratios) if ratios else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def phases_of(samples: Sequence[Sample]) -> dict[str, float]:
    """Median seconds by phase over timed rounds, in the order in which phases first come."""
    timed = [sample.reading.phases_s for sample in samples if sample.round != UNTIMED]
    names = dict.fromkeys(name for phases in timed for name in phases)
    return {name: median(phases.get(name, 0.0) for phases in timed) for name in names}


def layers_of(samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Median seconds, and rows, of each decoder layer over timed rounds; empty if there was no clock."""
    timed = [sample.reading.layers for sample in samples if sample.round != UNTIMED]
    by_layer = list(zip(*timed, strict=True))
    return (
        [median(use.seconds for use in uses) for uses in by_layer],
        [float(median(use.rows for use in uses)) for uses in by_layer],
    )


def aim_length(rows: Sequence[Row]) -> int | None:
    """The longest length up to ``AIM_LENGTH`` at which something was measured, or None."""
    return max((row.length for row in rows if row.rounds and row.length <= AIM_LENGTH), default=None)


def verdicts(rows: Sequence[Row], policies: Iterable[str]) -> list[Verdict]:
    """Every aim held against each of ``policies``, at ``aim_length``, whether met or missed.

    Args:
        rows: of any scenarios and lengths; aims of those that were not measured are left out.
        policies: those that reuse KV.
    """
    length, wanted = aim_length(rows), list(policies)
    found = []
    for row in rows:
        if row.length != length or row.policy not in wanted or row.speedup is None:
            continue
        if row.scenario in SPEED_AIMS:
            aim = SPEED_AIMS[row.scenario]
            words = f"{row.scenario}: first token {aim:g} times faster than off"
            figure = f"{row.speedup.value:.2f} times"
            found.append(Verdict(words, row.policy, row.length, figure, row.speedup.value >= aim))
        if row.scenario == CONTROL:
            overhead = 1 / row.speedup.value - 1
            words = f"{CONTROL}: overhead at most {MAX_OVERHEAD:.0%} of off"
            found.append(Verdict(words, row.policy, row.length, f"{overhead:+.1%}", overhead <= MAX_OVERHEAD))
        if row.policy == RETAINED and row.kv_retained_ratio is not None:
            saved = 1 - row.kv_retained_ratio
            words = f"{row.scenario}: {MIN_SAVED_KV:.0%} less KV kept"
            met = round(saved, 2) >= MIN_SAVED_KV  # kept are whole tokens
            found.append(Verdict(words, row.policy, row.length, f"{saved:.1%} less", met))
    return found
