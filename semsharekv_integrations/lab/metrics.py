"""Figures of quality: accuracy, agreement, stale facts and cost of each policy, beside a full prefill's.

They say nothing about prompts on which a policy reused nothing: those are only counted, and timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from semsharekv_integrations.lab.policies import FULL
from semsharekv_integrations.lab.quality import Outcome
from semsharekv_integrations.modes import Mode

CONTROLS: tuple[Mode, ...] = ("off", "exact")  # modes that reuse nothing off the prefix
NUM_RESAMPLES = 2000
_T = TypeVar("_T")


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One policy on one workload. Figures are None where there is no case to take them from.

    All but the first five, similarity, recall and the last are over the counted cases: those on which reuse fired, or
    all of them for a control, which reuses nothing off the prefix. Beside each stands that of a full prefill of the
    same cases. Shares have Wilson's interval, means and medians that of a bootstrap.

    Attributes:
        workload: what the cases are of.
        policy: what ran.
        cases: how many there were.
        fired: on how many KV was reused off the exact prefix.
        counted: how many the figures are over.
        accuracy: share of right answers, of those that are known.
        full_accuracy: that of a full prefill.
        difference_points: ``accuracy`` less ``full_accuracy`` in percentage points, its interval over pairs.
        agreement: share of answers that are those of a full prefill.
        stale_cases: cases in which the references' documents would answer otherwise.
        stale_rate: share of these that got that answer.
        full_stale_rate: that of a full prefill.
        rouge_l: mean over summaries, to the right one.
        full_rouge_l: that of a full prefill.
        rouge_l_to_full: mean over summaries, to that of a full prefill.
        similarity: median, of the documents asked about to their stored versions.
        lsh_recall: mean share of the tokens that hashing matches as well as comparing all of them.
        kv_kept_ratio: median share of the prompt's KV bytes that decoding had.
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
    agreement: Estimate | None
    stale_cases: int
    stale_rate: Estimate | None
    full_stale_rate: float | None
    rouge_l: Estimate | None
    full_rouge_l: float | None
    rouge_l_to_full: Estimate | None
    similarity: Estimate | None
    lsh_recall: Estimate | None
    kv_kept_ratio: Estimate | None
    compute_ratio: Estimate | None
    ttft_ratio: Estimate | None
    rest_ttft_ratio: Estimate | None


class _Pair(NamedTuple):
    """A policy's outcome, and a full prefill's of the same case."""

    policy: Outcome
    full: Outcome


def summarize(outcomes: Sequence[Outcome], seed: int = 0) -> list[Row]:
    """One row for each workload and policy, in the order in which they come.

    Args:
        outcomes: those of full prefill among them, for every case.
        seed: of the bootstraps.
    """
    full = {(outcome.workload, outcome.case): outcome for outcome in outcomes if outcome.policy == FULL}
    groups: dict[tuple[str, str], list[_Pair]] = {}
    for outcome in outcomes:
        pair = _Pair(outcome, full[outcome.workload, outcome.case])
        groups.setdefault((outcome.workload, outcome.policy), []).append(pair)
    return [_row(workload, policy, pairs, seed) for (workload, policy), pairs in groups.items()]


def _row(workload: str, policy: str, pairs: Sequence[_Pair], seed: int) -> Row:
    counted = [pair for pair in pairs if _counts(pair.policy)]
    rest = [pair for pair in pairs if not _counts(pair.policy)]
    own, full = [pair.policy for pair in counted], [pair.full for pair in counted]
    right, full_right = (_known(outcome.right for outcome in side) for side in (own, full))
    stale, full_stale = (_known(outcome.stale for outcome in side) for side in (own, full))

    def median(values: Iterable[float | None]) -> Estimate | None:
        return bootstrapped(_known(values), np.median, seed)

    def mean(values: Iterable[float | None]) -> Estimate | None:
        return bootstrapped(_known(values), np.mean, seed)

    return Row(
        workload=workload,
        policy=policy,
        cases=len(pairs),
        fired=sum(pair.policy.fired for pair in pairs),
        counted=len(counted),
        accuracy=_share(right),
        full_accuracy=_mean(full_right),
        difference_points=paired_difference(right, full_right, seed) if right else None,
        agreement=_share([outcome.agrees for outcome in own]),
        stale_cases=len(stale),
        stale_rate=_share(stale),
        full_stale_rate=_mean(full_stale),
        rouge_l=mean(outcome.rouge_l for outcome in own),
        full_rouge_l=_mean(_known(outcome.rouge_l for outcome in full)),
        rouge_l_to_full=mean(outcome.rouge_l_to_full for outcome in own),
        similarity=median(pair.policy.similarity for pair in pairs),
        lsh_recall=mean(pair.policy.lsh_recall for pair in pairs),
        kv_kept_ratio=median(outcome.kv_kept_ratio for outcome in own),
        compute_ratio=median(outcome.compute_ratio for outcome in own),
        ttft_ratio=median(pair.full.ttft_s / pair.policy.ttft_s for pair in counted),
        rest_ttft_ratio=median(pair.full.ttft_s / pair.policy.ttft_s for pair in rest),
    )


def _counts(outcome: Outcome) -> bool:
    return outcome.fired or outcome.mode in CONTROLS


def wilson(right: int, asked: int) -> Estimate:
    """A share and Wilson's 95% interval of it."""
    z, share = 1.96, right / asked
    centre = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    low, high = ((centre + side) / (1 + z * z / asked) for side in (-spread, spread))
    return Estimate(share, max(min(low, share), 0.0), min(max(high, share), 1.0))  # rounding may put it outside


def paired_difference(right: Sequence[bool], full_right: Sequence[bool], seed: int = 0) -> Estimate:
    """Percentage points by which the first is right more often than the second, by a bootstrap over pairs.

    Where no pair differs, the interval is a single point: a bootstrap cannot see what is rarer than the sample shows.
    """
    gaps = 100 * (np.array(right, dtype=float) - np.array(full_right, dtype=float))
    found = bootstrapped(gaps.tolist(), np.mean, seed)
    assert found is not None, "there is a pair"
    return found


def bootstrapped(values: Sequence[float], figure: Callable[..., np.ndarray], seed: int = 0) -> Estimate | None:
    """A figure of ``values`` with the 95% interval of a bootstrap; None if there are no values.

    Args:
        values: one for each case.
        figure: of an array along an axis, such as ``np.median``.
        seed: of the resampling.
    """
    if not values:
        return None
    sample = np.array(values, dtype=float)
    if (sample == sample[0]).all():
        return Estimate(*(float(sample[0]),) * 3)
    drawn = np.random.default_rng(seed).integers(len(sample), size=(NUM_RESAMPLES, len(sample)))
    low, high = np.percentile(figure(sample[drawn], axis=1), (2.5, 97.5))
    return Estimate(float(figure(sample)), float(low), float(high))


def _known(values: Iterable[_T | None]) -> list[_T]:
    return [value for value in values if value is not None]


def _share(values: Sequence[bool]) -> Estimate | None:
    return wilson(sum(values), len(values)) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
