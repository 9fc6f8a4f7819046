"""Figures: what each policy answered and what it cost, beside a full prefill of the same prompts.

A figure reads a number from each call and takes a statistic of them. Nothing is filtered: a scenario in which reuse
loses has its row like any other, and so has what could not be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from semsharekv_integrations.lab.policies import EXACT, FLOORS, FULL
from semsharekv_integrations.report import ReuseReport

NUM_RESAMPLES = 2000
_BESIDE_NAN: Mapping[Callable[..., Any], Callable[..., Any]] = {np.mean: np.nanmean, np.median: np.nanmedian}  # slow


@dataclass(frozen=True)
class Outcome:
    """One call: a case under one policy."""

    scenario: str
    policy: str
    case: int  # index within the scenario
    report: ReuseReport = field(default_factory=lambda: ReuseReport("off", 0))
    text: str = ""
    expected: str | None = None  # the right answer, or None if it is not known
    right: bool | None = None  # whether `text` is the right answer; None if that is not known
    agrees: bool | None = None  # whether it is what a full prefill gives; None if that failed
    # whether it is what the references' documents would answer; None if they say nothing else
    stale: bool | None = None
    store_s: float | None = None  # seconds that it took to put the references into the store
    store_bytes: int | None = None  # in the store after the call
    extra: Mapping[str, Any] = field(default_factory=dict)  # what a probe measured besides, by name
    group: int | None = None  # of the cases about the same documents; None where each has its own
    f1: float | None = None  # of `text` to the nearest right answer, in words
    full_f1: float | None = None  # of `text` to what a full prefill gives
    kl: tuple[float, ...] = ()  # at each token of a full prefill's answer, full to own, in nats
    top1: float | None = None  # share of these tokens at which the likeliest one is the same

    @property
    def fired(self) -> bool:
        """Whether KV was reused off the exact prefix."""
        return self.report.identical_tokens + self.report.fuzzy_tokens > 0

    @property
    def has_costs(self) -> bool:
        """Whether its times and counts are those of its policy: not of a floor, nor of a shared full prefill."""
        is_shared = self.policy == FULL and self.report.reused_tokens > 0
        return not is_shared and self.policy not in FLOORS

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens a second, behind the first one."""
        later = self.report.output_tokens - 1
        return later / self.report.decode_s if later > 0 and self.report.decode_s else None


@dataclass(frozen=True)
class Failure:
    """What was not measured, and why; ``policy`` is ``all`` if that holds for every one."""

    scenario: str
    policy: str
    reason: str


class Pair(NamedTuple):
    """A call, and those of a full prefill and of exact reuse on its case, unless they failed."""

    own: Outcome
    full: Outcome | None
    exact: Outcome | None


class Estimate(NamedTuple):
    """A value and its 95% interval over cases."""

    value: float
    low: float
    high: float


Groups = Sequence[int] | None  # the group of each value; None where each is a group of its own
Statistic = Callable[[Sequence[float], Groups], Estimate]  # of one value for each case


def estimate_share(values: Sequence[float], groups: Groups = None) -> Estimate:
    """Share of cases with Wilson's 95% interval; of a single case, which says little, without.

    Cases in groups are not independent: their interval is that of a bootstrap.
    """
    if groups:
        return estimate_mean(values, groups)
    z, asked = 1.96, len(values)
    right = sum(values) / asked
    if asked == 1:
        return Estimate(right, right, right)
    centre = right + z * z / (2 * asked)
    spread = z * math.sqrt(right * (1 - right) / asked + z * z / (4 * asked * asked))
    low, high = ((centre + side) / (1 + z * z / asked) for side in (-spread, spread))
    return Estimate(right, max(min(low, right), 0.0), min(max(high, right), 1.0))  # rounding may put it outside


def estimate_mean(values: Sequence[float], groups: Groups = None) -> Estimate:
    """Mean with the 95% interval of a bootstrap over groups."""
    return bootstrap(values, np.mean, groups)


def estimate_median(values: Sequence[float], groups: Groups = None) -> Estimate:
    """Median with the 95% interval of a bootstrap over groups."""
    return bootstrap(values, np.median, groups)


def estimate_worst_share(values: Sequence[float], groups: Groups = None) -> Estimate:
    """What share of the whole the worst tenth of the cases makes; without an interval."""
    found = sorted(values, reverse=True)
    worst, whole = sum(found[: math.ceil(len(found) / 10)]), sum(found)
    return Estimate(*(worst / whole if whole else 0.0,) * 3)


def compute_mcnemar(values: Sequence[float], groups: Groups = None) -> Estimate:
    """McNemar's exact p, two-sided, of paired differences: how likely as uneven a split is if none is better."""
    signs = [math.copysign(1, value) for value in values if value]
    fewer, all_pairs = min(signs.count(1), signs.count(-1)), len(signs)
    tail = sum(math.comb(all_pairs, number) for number in range(fewer + 1)) / 2**all_pairs
    return Estimate(*(min(1.0, 2 * tail),) * 3)


def bootstrap(values: Sequence[float], figure: Callable[..., np.ndarray], groups: Groups = None) -> Estimate:
    """A figure of one value or more with the 95% interval of a bootstrap; a single point where no value differs.

    What is drawn again is whole groups, of which ``groups`` names one for each value; default: each value by itself.
    """
    sample = np.array(values, dtype=float)
    if (sample == sample[0]).all():
        return Estimate(*(float(sample[0]),) * 3)
    places: dict[int, list[int]] = {}
    for place, group in enumerate(groups or range(len(sample))):
        places.setdefault(group, []).append(place)
    padded = np.full((len(places), max(map(len, places.values()))), np.nan)
    for row, found in zip(padded, places.values(), strict=True):
        row[: len(found)] = sample[found]
    drawn = np.random.default_rng(0).integers(len(padded), size=(NUM_RESAMPLES, len(padded)))
    over = _BESIDE_NAN.get(figure, figure) if np.isnan(padded).any() else figure
    low, high = np.percentile(over(padded[drawn].reshape(NUM_RESAMPLES, -1), axis=1), (2.5, 97.5))
    return Estimate(float(figure(sample)), float(low), float(high))


class Figure(NamedTuple):
    """One figure of a row."""

    name: str  # in rows and in JSON
    title: str  # above its column
    form: str  # how it is written
    read: Callable[[Pair], float | None]  # its value for a call; None where it has none
    statistic: Statistic = estimate_median  # of these values
    scale: float = 1.0  # of the figure as it is written
    short: str = ""  # above its column on a terminal; nothing for a figure that is not shown there


def _compare_right(pair: Pair) -> float | None:
    """Percentage points for this case: 0 if both or none is right."""
    if pair.full is None or pair.own.right is None or pair.full.right is None:
        return None
    return 100.0 * (pair.own.right - pair.full.right)


def _compare_to_full(pair: Pair) -> float | None:
    return None if pair.own.policy == FULL else _compare_right(pair)


def _read_kl(reduce: Callable[[Sequence[float]], float]) -> Callable[[Pair], float | None]:
    return lambda pair: reduce(pair.own.kl) if pair.own.kl else None


def _read_cost(name: str) -> Callable[[Pair], float | None]:
    return lambda pair: getattr(pair.own.report, name) if pair.own.has_costs else None


def _read_fired(pair: Pair) -> bool | None:
    return pair.own.report.reused_tokens > 0 if pair.own.has_costs else None


def _read_divergence(pair: Pair) -> float | None:
    audit = pair.own.report.audit
    return None if audit is None else audit.kl_divergence


def _divide_ttft(other: Outcome | None, own: Outcome) -> float | None:
    """How many times longer ``other`` took; None if one of them has no times of its own."""
    if other is None or not (other.has_costs and own.has_costs):
        return None
    return other.report.ttft_s / own.report.ttft_s


FIGURES = (
    Figure("accuracy", "accuracy", ".3f", lambda p: p.own.right, estimate_share, short="right"),
    Figure("difference_points", "difference in points", "+.1f", _compare_right, estimate_mean, short="points to off"),
    Figure("mcnemar_p", "McNemar's p", ".3f", _compare_to_full, compute_mcnemar),
    Figure("f1", "F1", ".3f", lambda p: p.own.f1, estimate_mean),
    Figure("full_f1", "F1 to full prefill's", ".3f", lambda p: p.own.full_f1, estimate_mean),
    Figure("agreement", "agreement", ".3f", lambda p: p.own.agrees, estimate_share, short="agrees"),
    Figure("stale_rate", "stale", ".3f", lambda p: p.own.stale, estimate_share, short="stale"),
    Figure("kl_divergence", "KL", ".2g", _read_divergence),
    Figure("answer_kl", "KL along the answer", ".4f", _read_kl(fmean), estimate_mean, short="KL"),
    Figure("worst_kl", "its worst token", ".3f", _read_kl(max), estimate_mean),
    Figure("worst_kl_share", "share of the worst tenth", ".2f", _read_kl(fmean), estimate_worst_share),
    Figure("top1", "top-1", ".3f", lambda p: p.own.top1, estimate_mean, short="top-1"),
    Figure("fired_share", "reused", ".2f", _read_fired, estimate_share),
    Figure("prompt_tokens", "tokens", ".0f", lambda p: p.own.report.prompt_tokens),
    Figure("reused_tokens", "reused tokens", ".0f", _read_cost("reused_tokens")),
    Figure("compute_ratio", "compute", ".3f", _read_cost("compute_ratio"), short="compute"),
    Figure("ttft_s", "TTFT, ms", ".1f", _read_cost("ttft_s"), scale=1000),
    Figure("ttft_ratio", "times faster than off", ".2f", lambda p: _divide_ttft(p.full, p.own), short="x off"),
    Figure("exact_ratio", "than exact", ".2f", lambda p: _divide_ttft(p.exact, p.own)),
    Figure("kv_kept_ratio", "KV kept", ".3f", lambda p: p.own.report.kv_retained_ratio),
    Figure("kv_bytes", "KV, MB", ".1f", lambda p: p.own.report.kv_bytes, scale=1e-6),
    Figure("store_bytes", "in store, MB", ".1f", lambda p: p.own.store_bytes, scale=1e-6),
    Figure("store_s", "into store, ms", ".1f", lambda p: p.own.store_s, scale=1000),
    Figure("decode_tokens_per_s", "decode, tokens/s", ".1f", lambda p: p.own.decode_tokens_per_s),
)


@dataclass(frozen=True)
class Row:
    """One policy in one scenario."""

    scenario: str
    policy: str
    cases: int = 0
    groups: int = 0  # that they come in; none where each case has its own documents
    # by name, those for which there is something to take them from
    figures: Mapping[str, Estimate] = field(default_factory=dict)
    note: str = ""  # why it was not measured, or why nothing was ever reused

    def __getitem__(self, name: str) -> Estimate | None:
        return self.figures.get(name)


def summarize(
    outcomes: Sequence[Outcome], failures: Sequence[Failure] = (), figures: Sequence[Figure] = FIGURES
) -> list[Row]:
    """One row for each scenario and policy, grouped by scenario. A failure becomes the note of its row."""
    calls: dict[tuple[str, int], dict[str, Outcome]] = {}
    for o in outcomes:
        calls.setdefault((o.scenario, o.case), {})[o.policy] = o
    pairs: dict[tuple[str, str], list[Pair]] = {(o.scenario, o.policy): [] for o in outcomes}
    for (scenario, _), said in calls.items():
        for policy, own in said.items():
            pairs[scenario, policy].append(Pair(own, said.get(FULL), said.get(EXACT)))
    rows = {key: _make_row(*key, found, figures) for key, found in pairs.items()}
    for failure in failures:
        key = (failure.scenario, failure.policy)
        rows[key] = replace(rows.get(key) or Row(*key), note=failure.reason)  # beside what was measured before
    scenarios = list(dict.fromkeys(row.scenario for row in rows.values()))
    return sorted(rows.values(), key=lambda row: scenarios.index(row.scenario))


def _make_row(scenario: str, policy: str, pairs: Sequence[Pair], figures: Sequence[Figure]) -> Row:
    groups = [pair.own.group for pair in pairs if pair.own.group is not None]
    found = {}
    for figure in figures:
        read = [(value, pair.own.group) for pair in pairs if (value := figure.read(pair)) is not None]
        if read:
            over = [group for _, group in read if group is not None]
            found[figure.name] = figure.statistic([float(value) for value, _ in read], over or None)
    reasons = {pair.own.report.declined or "" for pair in pairs}
    return Row(scenario, policy, len(pairs), len(set(groups)), found, note=reasons.pop() if len(reasons) == 1 else "")
