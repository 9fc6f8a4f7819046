"""Figures: over every case, or those on which reuse fired, in pairs with a full prefill, with known intervals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drawn import DRAWN_FIGURES
from semsharekv_integrations.lab.figures import (
    Estimate,
    Failure,
    Outcome,
    bootstrap,
    estimate_mean,
    estimate_share,
    summarize,
)
from semsharekv_integrations.report import AuditResult, ReuseReport

OUTCOME = Outcome("edited", "off", 0, ReuseReport("off", 100, ttft_s=2.0), "x", "x", True, True, False)


def binomial(right: int, asked: int) -> Estimate:
    return estimate_share([float(case < right) for case in range(asked)])


def full(case: int, right: bool, stale: bool | None = False, ttft_s: float = 2.0) -> Outcome:
    return replace(OUTCOME, case=case, right=right, stale=stale, report=ReuseReport("off", 100, ttft_s=ttft_s))


def reused(case: int, right: bool, *, fired: bool = True, ttft_s: float = 1.0, **fields) -> Outcome:
    report = ReuseReport("identical", 100, identical_tokens=90 * fired, compute_ratio=0.1 * (case + 1), ttft_s=ttft_s)
    return replace(OUTCOME, policy="identical", case=case, right=right, report=report, **fields)


DRAWN = [
    full(0, True),
    full(1, True, ttft_s=4.0),
    full(2, False, stale=True),
    full(3, True, stale=None, ttft_s=6.0),
    full(4, False),
    reused(0, True),
    reused(1, False, stale=True, agrees=False),
    reused(2, False, stale=True),
    reused(3, True, stale=None),
    reused(4, True, fired=False, ttft_s=4.0),
]


def test_figures_are_over_every_case() -> None:
    first, row = summarize(DRAWN)
    assert (row.scenario, row.policy, row.cases, row.groups) == ("edited", "identical", 5, 0)
    assert row["accuracy"] == binomial(3, 5) == first["accuracy"] and row["difference_points"].value == 0
    assert row["fired_share"] == binomial(4, 5) and row["stale_rate"].value == 0.5
    assert row["ttft_ratio"].value == 2.0  # of 2, 4, 2, 6 and 0.5
    assert row["mcnemar_p"].value == 1 and first["mcnemar_p"] is None, "one case is won, and one is lost"


def test_figures_of_drawn_prompts_are_over_the_cases_on_which_reuse_fired() -> None:
    first, row = summarize(DRAWN, figures=DRAWN_FIGURES)
    assert (row.scenario, row.policy, row.cases, row["fired"]) == ("edited", "identical", 5, binomial(4, 5))
    assert row["accuracy"].value == 0.5 and row["full_accuracy"] == binomial(3, 4)
    assert row["difference_points"].value == -25
    assert -75 <= row["difference_points"].low < -25 < row["difference_points"].high <= 0
    assert row["agreement"] == binomial(3, 4)
    assert row["full_stale_rate"].value == pytest.approx(1 / 3) and row["stale_rate"] == binomial(2, 3)
    assert row["compute_ratio"].value == pytest.approx(0.25)
    assert row["ttft_ratio"].value == 3.0  # of 2, 4, 2 and 6
    assert 2 <= row["ttft_ratio"].low < 3 < row["ttft_ratio"].high <= 6
    assert row["rest_ttft_ratio"] == (0.5, 0.5, 0.5)
    assert (first.policy, first["accuracy"].value) == ("off", 0.6) == ("off", first["full_accuracy"].value)
    assert first["difference_points"] == (0, 0, 0) and first["ttft_ratio"] == (1, 1, 1)
    assert first["rest_ttft_ratio"] is None and first["fired"].value == 0


def test_a_row_without_counted_cases_has_no_figures_but_of_the_rest() -> None:
    _, row = summarize([full(0, True), reused(0, True, fired=False)], figures=DRAWN_FIGURES)
    assert row.cases == 1 and row.figures == {"fired": (0, 0, 0), "rest_ttft_ratio": (2, 2, 2)}


def test_an_answer_that_is_not_known_counts_for_agreement_alone() -> None:
    _, row = summarize([replace(outcome, right=None, stale=None) for outcome in DRAWN])
    assert row["accuracy"] is row["difference_points"] is row["stale_rate"] is None
    assert row["agreement"].value == 0.8


def test_a_full_prefill_that_failed_leaves_what_needs_no_pair() -> None:
    (row,) = summarize([outcome for outcome in DRAWN if outcome.policy != "off"])
    assert row["accuracy"].value == 0.6 and row["difference_points"] is row["ttft_ratio"] is None


def test_rows_keep_scenarios_and_policies_apart() -> None:
    other = [replace(outcome, scenario="turns", right=not outcome.right) for outcome in DRAWN]
    rows = summarize([*DRAWN, *other])
    assert [(r.scenario, r.policy) for r in rows] == [(w, p) for w in ("edited", "turns") for p in ("off", "identical")]
    assert rows[:2] == summarize(DRAWN)
    assert rows[2]["accuracy"].value == pytest.approx(0.4) == rows[3]["accuracy"].value


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (200, 200, 0.9812, 1.0),
        (1, 4, 0.0456, 0.6994),
    ],
)
def test_wilson_intervals_are_the_known_ones(right: int, asked: int, low: float, high: float) -> None:
    assert binomial(right, asked) == (
        right / asked,
        pytest.approx(low, abs=1e-4),
        pytest.approx(high, abs=1e-4),
    )


def difference(right: list[bool], full_right: list[bool]) -> Estimate:
    outcomes = [full(case, is_right) for case, is_right in enumerate(full_right)]
    outcomes += [reused(case, is_right) for case, is_right in enumerate(right)]
    found = summarize(outcomes)[1]["difference_points"]
    assert found is not None
    return found


def test_a_paired_difference_has_the_interval_of_its_pairs() -> None:
    right, full_right = [True] * 360 + [False] * 40, [True] * 400
    value, low, high = difference(right, full_right)
    assert value == -10
    half = 1.96 * 100 * (0.1 * 0.9 / 400) ** 0.5  # of a binomial share
    assert low == pytest.approx(-10 - half, abs=0.5) and high == pytest.approx(-10 + half, abs=0.5)
    assert difference(right, full_right) == difference(right, full_right)
    assert difference(full_right, right) == (10, pytest.approx(-high, abs=0.3), pytest.approx(-low, abs=0.3))
    # what counts is the pairs: the same shares with wrong answers in the same places differ by nothing
    assert difference(right, right) == (0, 0, 0)


def test_an_interval_holds_its_share_and_stays_within_none_and_all() -> None:
    for asked in range(1, 130):
        for right in range(asked + 1):
            share, low, high = binomial(right, asked)
            assert 0 <= low <= share <= high <= 1, (right, asked)


def test_ratios_are_taken_within_a_case() -> None:
    times = {"off": (10.0, 20.0, 12.0), "exact": (5.0, 5.0, 5.0), "identical": (1.0, 1.0, 1.0)}
    outcomes = [
        replace(OUTCOME, policy=policy, case=case, report=ReuseReport("off", 100, ttft_s=seconds))
        for policy, found in times.items()
        for case, seconds in enumerate(found)
    ]
    off, exact, identical = summarize(outcomes)
    assert identical["ttft_ratio"].value == 12.0, "the median of 10, 20 and 12 times"
    assert identical["exact_ratio"] == (5.0, 5.0, 5.0) and off["ttft_ratio"] == (1.0, 1.0, 1.0)
    assert exact["ttft_ratio"].value == pytest.approx(2.4) and off["ttft_s"].value == 12.0
    (alone,) = summarize(outcomes[-1:])
    assert alone["ttft_ratio"] is alone["exact_ratio"] is None


def test_why_nothing_was_reused_is_noted_where_it_holds_for_every_case() -> None:
    declined = [replace(own, report=replace(own.report, declined="so | so")) for own in DRAWN if own.policy != "off"]
    assert [row.note for row in summarize(declined)] == ["so | so"]
    assert [row.note for row in summarize([*declined[1:], DRAWN[5]])] == [""]


def test_a_late_failure_leaves_the_figures_from_before() -> None:
    *_, identical = summarize(DRAWN, [Failure("edited", "identical", "out of memory")])
    assert identical.cases == 5 and identical.figures and identical.note == "out of memory"
    *_, failed = summarize(DRAWN, [Failure("other", "all", "beyond")])
    assert (failed.scenario, failed.policy, failed.figures, failed.note) == ("other", "all", {}, "beyond")


def test_memory_decoding_and_divergence_are_read_from_the_report() -> None:
    audit = AuditResult(True, 0.25, 8)
    report = ReuseReport(
        "identical", 10, ttft_s=1, decode_s=2.0, output_tokens=9, kv_bytes=70, kv_retained_ratio=0.58, audit=audit
    )
    (row,) = summarize([Outcome("shared", "identical", 0, report, store_s=0.5, store_bytes=80)])
    found = {name: row[name].value for name in ("decode_tokens_per_s", "kv_bytes", "kv_kept_ratio", "kl_divergence")}
    assert found == {"decode_tokens_per_s": 4.0, "kv_bytes": 70, "kv_kept_ratio": 0.58, "kl_divergence": 0.25}
    assert (row["store_s"].value, row["store_bytes"].value) == (0.5, 80)
    assert Outcome("shared", "x", 0, ReuseReport("off", 1)).decode_tokens_per_s is None


def test_statistics_of_one_value_are_that_value() -> None:
    assert bootstrap([3.0, 3.0], max) == bootstrap([3.0], max) == estimate_mean([3.0]) == (3, 3, 3)
