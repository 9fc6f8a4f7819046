"""Figures: what each policy answered and what it cost, beside a full prefill of the same prompts.

A figure reads a number from each call and takes a statistic of them. Nothing is filtered: a scenario in which reuse
loses has its row like any other, and so has what could not be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from semsharekv_integrations.config import Mode
from semsharekv_integrations.lab.policies import EXACT, FULL
from semsharekv_integrations.report import ReuseReport

CONTROLS: tuple[Mode, ...] = ("off", "exact")  # modes that reuse nothing off the prefix
UNTIMED = 0  # the round into which one-time costs fall
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Outcome:
    """One call: a case under one policy, in one round."""

    scenario: str
    length: int | None  # tokens that the prompt was asked to have, or None if it was drawn
    policy: str
    case: int  # index within the scenario
    round: int  # from 1 on; 0 is not timed
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

    @property
    def fired(self) -> bool:
        """Whether KV was reused off the exact prefix."""
        return self.report.identical_tokens + self.report.fuzzy_tokens > 0

    @property
    def is_counted(self) -> bool:
        """Whether figures are over it: of drawn prompts where reuse fired or the policy is a control, else always."""
        return self.length is not None or self.fired or self.report.mode in CONTROLS

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens a second, behind the first one."""
        later = self.report.output_tokens - 1
        return later / self.report.decode_s if later > 0 and self.report.decode_s else None


@dataclass(frozen=True)
class Failure:
    """What was not measured, and why; ``policy`` is ``all`` if that holds for every one."""

    scenario: str
    length: int | None
    policy: str
    reason: str


class Pair(NamedTuple):
    """A call, and those of a full prefill and of exact reuse on its case in its round, unless they failed."""

    own: Outcome
    full: Outcome | None
    exact: Outcome | None


class Estimate(NamedTuple):
    """A value and what it lies between: its 95% interval over cases or, of a single case, quartiles over rounds."""

    value: float
    low: float
    high: float


Values = Mapping[int, Sequence[float]]  # by case, one for each round


def estimate_share(values: Values, seed: int) -> Estimate:
    """Of cases, each of which counts once, with Wilson's 95% interval; of a single case, which says little, without."""
    z, asked = 1.96, len(values)
    right = sum(found[0] for found in values.values()) / asked
    if asked == 1:
        return Estimate(right, right, right)
    centre = right + z * z / (2 * asked)
    spread = z * math.sqrt(right * (1 - right) / asked + z * z / (4 * asked * asked))
    low, high = ((centre + side) / (1 + z * z / asked) for side in (-spread, spread))
    return Estimate(right, max(min(low, right), 0.0), min(max(high, right), 1.0))  # rounding may put it outside


def estimate_mean(values: Values, seed: int) -> Estimate:
    """Over cases, each of which counts once, with the 95% interval of a bootstrap."""
    return bootstrap([found[0] for found in values.values()], np.mean, seed)


def estimate_median(values: Values, seed: int) -> Estimate:
    """Median over cases with the 95% interval of a bootstrap; of a single case over rounds, with quartiles."""
    if len(values) > 1:
        return bootstrap([median(found) for found in values.values()], np.median, seed)
    return find_quartiles(next(iter(values.values())))


def find_quartiles(values: Sequence[float]) -> Estimate:
    """Median and quartiles of one value or more."""
    low, value, high = np.percentile(values, (25, 50, 75))
    return Estimate(float(value), float(low), float(high))


def bootstrap(values: Sequence[float], figure: Callable[..., np.ndarray], seed: int = 0) -> Estimate:
    """A figure of one value or more with the 95% interval of a bootstrap; a single point where no value differs."""
    sample = np.array(values, dtype=float)
    if (sample == sample[0]).all():
        return Estimate(*(float(sample[0]),) * 3)
    drawn = np.random.default_rng(seed).integers(len(sample), size=(NUM_RESAMPLES, len(sample)))
    low, high = np.percentile(figure(sample[drawn], axis=1), (2.5, 97.5))
    return Estimate(float(figure(sample)), float(low), float(high))


class Figure(NamedTuple):
    """One figure of a row."""

    name: str  # in rows and in JSON
    title: str  # above its column
    form: str  # how it is written
    read: Callable[[Pair], float | None]  # its value for a call; None where it has none
    statistic: Callable[[Values, int], Estimate] = estimate_median  # of these values over the timed calls
    over: Callable[[Outcome], bool] = lambda outcome: outcome.is_counted  # which calls; default: those that count
    scale: float = 1.0  # of the figure as it is written
    short: str = ""  # above its column on a terminal; nothing for a figure that is not shown there


def _compare_right(pair: Pair) -> float | None:
    """Percentage points for this case: 0 if both or none is right."""
    if pair.full is None or pair.own.right is None or pair.full.right is None:
        return None
    return 100.0 * (pair.own.right - pair.full.right)


def _read_full_stale(pair: Pair) -> bool | None:
    return None if pair.full is None else pair.full.stale


def _read_divergence(pair: Pair) -> float | None:
    audit = pair.own.report.audit
    return None if audit is None else audit.kl_divergence


def _divide_ttft(other: Outcome | None, own: Outcome) -> float | None:
    """How many times longer ``other`` took."""
    return None if other is None else other.report.ttft_s / own.report.ttft_s


def _is_rest(outcome: Outcome) -> bool:
    return not outcome.is_counted


def _measure_overhead(pair: Pair) -> float | None:
    ratio, compute = _divide_ttft(pair.full, pair.own), pair.own.report.compute_ratio
    return 1 / ratio / compute if ratio and compute else None


FIGURES = (
    Figure("accuracy", "accuracy", ".3f", lambda p: p.own.right, estimate_share, short="right"),
    Figure("full_accuracy", "full prefill's", ".3f", lambda p: p.full.right if p.full else None, estimate_share),
    Figure("difference_points", "difference in points", "+.1f", _compare_right, estimate_mean, short="points to off"),
    Figure("agreement", "agreement", ".3f", lambda p: p.own.agrees, estimate_share, short="agrees"),
    Figure("stale_rate", "stale", ".3f", lambda p: p.own.stale, estimate_share, short="stale"),
    Figure(
        "full_stale_rate", "full prefill's stale", ".3f", lambda p: p.full.stale if p.full else None, estimate_share
    ),
    Figure("kl_divergence", "KL", ".2g", _read_divergence),
    Figure("prompt_tokens", "tokens", ".0f", lambda p: p.own.report.prompt_tokens, short="tokens"),
    Figure("reused_tokens", "reused", ".0f", lambda p: p.own.report.reused_tokens),
    Figure("compute_ratio", "compute", ".3f", lambda p: p.own.report.compute_ratio, short="compute"),
    Figure("ttft_s", "TTFT, ms", ".1f", lambda p: p.own.report.ttft_s, scale=1000, short="TTFT, ms"),
    Figure("ttft_ratio", "times faster than off", ".2f", lambda p: _divide_ttft(p.full, p.own), short="x off"),
    Figure("rest_ttft_ratio", "than off, rest", ".2f", lambda p: _divide_ttft(p.full, p.own), over=_is_rest),
    Figure("exact_ratio", "than exact", ".2f", lambda p: _divide_ttft(p.exact, p.own), short="x exact"),
    Figure("overhead", "overhead", ".2f", _measure_overhead, short="overhead"),
    Figure("kv_kept_ratio", "KV kept", ".3f", lambda p: p.own.report.kv_retained_ratio),
    Figure("kv_bytes", "KV, MB", ".1f", lambda p: p.own.report.kv_bytes, scale=1e-6),
    Figure("store_bytes", "in store, MB", ".1f", lambda p: p.own.store_bytes, scale=1e-6),
    Figure("store_s", "into store, ms", ".1f", lambda p: p.own.store_s, scale=1000),
    Figure("decode_tokens_per_s", "decode, tokens/s", ".1f", lambda p: p.own.decode_tokens_per_s),
)


@dataclass(frozen=True)
class Row:
    """One policy in one scenario at one length."""

    scenario: str
    length: int | None
    policy: str
    cases: int = 0
    fired: int = 0  # on how many of the cases KV was reused off the exact prefix
    counted: int = 0  # how many of them the figures are over
    rounds: int = 0  # timed rounds of each case
    # by name, those for which there is something to take them from
    figures: Mapping[str, Estimate] = field(default_factory=dict)
    note: str = ""  # why it was not measured, or why nothing was reused

    def __getitem__(self, name: str) -> Estimate | None:
        return self.figures.get(name)


def summarize(
    outcomes: Sequence[Outcome],
    failures: Sequence[Failure] = (),
    figures: Sequence[Figure] = FIGURES,
    seed: int = 0,
) -> list[Row]:
    """One row for each scenario, length and policy, grouped by scenario and ascending in length.

    A failure becomes the note of its row. ``seed`` is that of the bootstraps.
    """
    calls: dict[tuple[str, int | None, int, int], dict[str, Outcome]] = {}
    for o in outcomes:
        calls.setdefault((o.scenario, o.length, o.case, o.round), {})[o.policy] = o
    groups: dict[tuple[str, int | None, str], list[Pair]] = {(o.scenario, o.length, o.policy): [] for o in outcomes}
    for (scenario, length, *_), said in calls.items():
        for policy, own in said.items():
            groups[scenario, length, policy].append(Pair(own, said.get(FULL), said.get(EXACT)))
    rows = {key: _make_row(Row(*key), pairs, figures, seed) for key, pairs in groups.items()}
    for failure in failures:
        key = (failure.scenario, failure.length, failure.policy)
        rows[key] = replace(rows.get(key) or Row(*key), note=failure.reason)  # beside what was measured before
    scenarios = list(dict.fromkeys(row.scenario for row in rows.values()))
    return sorted(rows.values(), key=lambda row: (scenarios.index(row.scenario), row.length or 0))


def _make_row(row: Row, pairs: Sequence[Pair], figures: Sequence[Figure], seed: int) -> Row:
    timed = [pair for pair in pairs if pair.own.round != UNTIMED]
    found = {}
    for figure in figures:
        values: dict[int, list[float]] = {}
        for pair in timed:
            value = figure.read(pair) if figure.over(pair.own) else None
            if value is not None:
                values.setdefault(pair.own.case, []).append(float(value))
        if values:
            found[figure.name] = figure.statistic(values, seed)
    return replace(
        row,
        cases=len({pair.own.case for pair in pairs}),
        fired=len({pair.own.case for pair in pairs if pair.own.fired}),
        counted=len({pair.own.case for pair in timed if pair.own.is_counted}),
        rounds=len({pair.own.round for pair in timed}),
        figures=found,
        note=(timed[-1].own.report.declined or "") if timed and row.length is not None else "",
    )
