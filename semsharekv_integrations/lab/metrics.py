"""Figures of quality: accuracy, agreement, stale facts and cost of each policy, beside a full prefill's.

They say nothing about prompts on which a policy reused nothing: those are only counted, and timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from semsharekv_integrations.lab.policies import FULL
from semsharekv_integrations.lab.quality import Outcome
from semsharekv_integrations.modes import Mode

CONTROLS: tuple[Mode, ...] = ("off", "exact")  # modes that reuse nothing off the prefix
NUM_RESAMPLES = 5000
COLUMNS = (
    "workload",
    "policy",
    "fired of cases",
    "accuracy",
    "full prefill's",
    "difference in points",
    "agreement",
    "stale",
    "full prefill's",
    "compute",
    "TTFT ratio",
    "TTFT ratio, rest",
)


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One policy on one workload. Figures are None where there is no case to take them from.

    All but the first five and the last are over the counted cases: those on which reuse fired, or all of them for
    a control, which reuses nothing off the prefix. Beside each stands that of a full prefill of the same cases.

    Attributes:
        workload: what the cases are of.
        policy: what ran.
        cases: how many there were.
        fired: on how many KV was reused off the exact prefix.
        counted: how many the figures are over.
        accuracy: share of right answers, with Wilson's interval.
        full_accuracy: that of a full prefill.
        difference_points: ``accuracy`` less ``full_accuracy`` in percentage points, with a paired bootstrap's interval.
        agreement: share of answers that are those of a full prefill.
        stale_cases: cases in which the references' documents would answer otherwise.
        stale_rate: share of these that got that answer.
        full_stale_rate: that of a full prefill.
        compute_ratio: median share of the token-layers that was computed.
        ttft_ratio: median of a full prefill's time to first token over this policy's; above 1 is faster.
        rest_ttft_ratio: the same over the cases that are not counted: what looking in vain costs.
    """

    workload: str
    policy: str
    cases: int
    fired: int
    counted: int
    accuracy: Estimate | None
    full_accuracy: float | None
    difference_points: Estimate | None
    agreement: float | None
    stale_cases: int
    stale_rate: float | None
    full_stale_rate: float | None
    compute_ratio: float | None
    ttft_ratio: float | None
    rest_ttft_ratio: float | None


class _Pair(NamedTuple):
    """A policy's outcome, and a full prefill's of the same case."""

    policy: Outcome
    full: Outcome


def summarize(outcomes: Sequence[Outcome], seed: int = 0) -> list[Row]:
    """One row for each workload and policy, in the order in which they come.

    Args:
        outcomes: those of full prefill among them, for every case.
        seed: of the bootstrap.
    """
    full = {(outcome.workload, outcome.case): outcome for outcome in outcomes if outcome.policy == FULL}
    groups: dict[tuple[str, str], list[_Pair]] = {}
    for outcome in outcomes:
        pair = _Pair(outcome, full[outcome.workload, outcome.case])
        groups.setdefault((outcome.workload, outcome.policy), []).append(pair)
    return [_row(workload, policy, pairs, seed) for (workload, policy), pairs in groups.items()]


def _row(workload: str, policy: str, pairs: Sequence[_Pair], seed: int) -> Row:
    counted = [pair for pair in pairs if pair.policy.fired or pair.policy.mode in CONTROLS]
    rest = [pair for pair in pairs if pair not in counted]
    right, full_right = ([outcome.right for outcome in side] for side in _sides(counted))
    stale, full_stale = ([o.stale for o in side if o.stale is not None] for side in _sides(counted))
    return Row(
        workload=workload,
        policy=policy,
        cases=len(pairs),
        fired=sum(pair.policy.fired for pair in pairs),
        counted=len(counted),
        accuracy=wilson(sum(right), len(right)) if counted else None,
        full_accuracy=_share(full_right),
        difference_points=paired_difference(right, full_right, seed) if counted else None,
        agreement=_share([pair.policy.agrees for pair in counted]),
        stale_cases=len(stale),
        stale_rate=_share(stale),
        full_stale_rate=_share(full_stale),
        compute_ratio=median(pair.policy.compute_ratio for pair in counted) if counted else None,
        ttft_ratio=_ttft_ratio(counted),
        rest_ttft_ratio=_ttft_ratio(rest),
    )


def wilson(right: int, asked: int) -> Estimate:
    """A share and Wilson's 95% interval of it."""
    z, share = 1.96, right / asked
    centre = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    low, high = ((centre + side) / (1 + z * z / asked) for side in (-spread, spread))
    return Estimate(share, max(low, 0.0), min(high, 1.0))


def paired_difference(right: Sequence[bool], full_right: Sequence[bool], seed: int = 0) -> Estimate:
    """Percentage points by which the first is right more often than the second, by a bootstrap over pairs.

    Where no pair differs, the interval is a single point: a bootstrap cannot see what is rarer than the sample shows.
    """
    gaps = 100 * (np.array(right, dtype=float) - np.array(full_right, dtype=float))
    drawn = np.random.default_rng(seed).integers(len(gaps), size=(NUM_RESAMPLES, len(gaps)))
    low, high = np.percentile(gaps[drawn].mean(axis=1), (2.5, 97.5))
    return Estimate(float(gaps.mean()), float(low), float(high))


def _sides(pairs: Sequence[_Pair]) -> tuple[list[Outcome], list[Outcome]]:
    return [pair.policy for pair in pairs], [pair.full for pair in pairs]


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _ttft_ratio(pairs: Sequence[_Pair]) -> float | None:
    return median(pair.full.ttft_s / pair.policy.ttft_s for pair in pairs) if pairs else None


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> list[str]:
    return [
        row.workload,
        row.policy,
        f"all {row.cases}" if row.counted == row.cases and not row.fired else f"{row.fired} of {row.cases}",
        _number(row.accuracy, ".3f"),
        _number(row.full_accuracy, ".3f"),
        _number(row.difference_points, "+.1f"),
        _number(row.agreement, ".3f"),
        _number(row.stale_rate, ".3f"),
        _number(row.full_stale_rate, ".3f"),
        _number(row.compute_ratio, ".3f"),
        _number(row.ttft_ratio, ".2f"),
        _number(row.rest_ttft_ratio, ".2f"),
    ]


def _number(value: Estimate | float | None, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
    return f"{value:{form}}"
