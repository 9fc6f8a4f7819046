"""Figures: over the cases on which reuse fired, in pairs with a full prefill, within a round, with known intervals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from semsharekv_integrations.lab.figures import (
    Estimate,
    Failure,
    Outcome,
    bootstrap,
    estimate_mean,
    estimate_share,
    find_quartiles,
    summarize,
)
from semsharekv_integrations.report import AuditResult, ReuseReport

OUTCOME = Outcome("edited", None, "off", 0, 1, ReuseReport("off", 100, ttft_s=2.0), "x", "x", True, True, False)


def binomial(right: int, asked: int) -> Estimate:
    return estimate_share({case: [float(case < right)] for case in range(asked)}, 0)


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


def test_figures_are_over_the_cases_on_which_reuse_fired() -> None:
    first, row = summarize(DRAWN)
    assert (row.scenario, row.policy, row.cases, row.fired, row.counted) == ("edited", "identical", 5, 4, 4)
    assert row["accuracy"].value == 0.5 and row["full_accuracy"] == binomial(3, 4)
    assert row["difference_points"].value == -25
    assert -75 <= row["difference_points"].low < -25 < row["difference_points"].high <= 0
    assert row["agreement"] == binomial(3, 4)
    assert row["full_stale_rate"].value == pytest.approx(1 / 3) and row["stale_rate"] == binomial(2, 3)
    assert row["compute_ratio"].value == pytest.approx(0.25)
    assert row["ttft_ratio"].value == 3.0  # of 2, 4, 2 and 6
    assert 2 <= row["ttft_ratio"].low < 3 < row["ttft_ratio"].high <= 6
    assert row["rest_ttft_ratio"] == (0.5, 0.5, 0.5)
    assert (
        (first.policy, first.counted, first["accuracy"].value)
        == ("off", 5, 0.6)
        == ("off", 5, first["full_accuracy"].value)
    )
    assert first["difference_points"] == (0, 0, 0) and first["ttft_ratio"] == (1, 1, 1)
    assert first["rest_ttft_ratio"] is None


def test_a_row_without_counted_cases_has_no_figures() -> None:
    _, row = summarize([full(0, True), reused(0, True, fired=False)])
    assert (row.cases, row.fired, row.counted) == (1, 0, 0)
    assert row.figures == {"rest_ttft_ratio": (2, 2, 2)}


def test_an_answer_that_is_not_known_counts_for_agreement_alone() -> None:
    _, row = summarize([replace(outcome, right=None, stale=None) for outcome in DRAWN])
    assert row["accuracy"] is row["full_accuracy"] is row["difference_points"] is row["stale_rate"] is None
    assert row["agreement"].value == 0.75


def test_a_full_prefill_that_failed_leaves_what_needs_no_pair() -> None:
    (row,) = summarize([outcome for outcome in DRAWN if outcome.policy != "off"])
    assert row["accuracy"].value == 0.5 and row["difference_points"] is row["ttft_ratio"] is None


def test_rows_keep_scenarios_lengths_and_policies_apart() -> None:
    other = [replace(outcome, scenario="turns", right=not outcome.right) for outcome in DRAWN]
    rows = summarize([*DRAWN, *other])
    assert [(r.scenario, r.policy) for r in rows] == [(w, p) for w in ("edited", "turns") for p in ("off", "identical")]
    assert rows[:2] == summarize(DRAWN)
    assert rows[2]["accuracy"].value == pytest.approx(0.4) and rows[3]["difference_points"].value == 25
    long = [replace(outcome, length=900) for outcome in DRAWN]
    assert [(row.length, row.counted) for row in summarize([*long, *DRAWN])] == [
        (None, 5),
        (None, 4),
        (900, 5),
        (900, 5),
    ]


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


def difference(right: list[bool], full_right: list[bool], seed: int = 0) -> Estimate:
    outcomes = [full(case, is_right) for case, is_right in enumerate(full_right)]
    outcomes += [reused(case, is_right) for case, is_right in enumerate(right)]
    found = summarize(outcomes, seed=seed)[1]["difference_points"]
    assert found is not None
    return found


def test_a_paired_difference_has_the_interval_of_its_pairs() -> None:
    right, full_right = [True] * 360 + [False] * 40, [True] * 400
    value, low, high = difference(right, full_right)
    assert value == -10
    half = 1.96 * 100 * (0.1 * 0.9 / 400) ** 0.5  # of a binomial share
    assert low == pytest.approx(-10 - half, abs=0.5) and high == pytest.approx(-10 + half, abs=0.5)
    assert difference(right, full_right, seed=5) == difference(right, full_right, seed=5)
    assert difference(full_right, right) == (10, pytest.approx(-high, abs=0.3), pytest.approx(-low, abs=0.3))
    # what counts is the pairs: the same shares with wrong answers in the same places differ by nothing
    assert difference(right, right) == (0, 0, 0)


def test_an_interval_holds_its_share_and_stays_within_none_and_all() -> None:
    for asked in range(1, 130):
        for right in range(asked + 1):
            share, low, high = binomial(right, asked)
            assert 0 <= low <= share <= high <= 1, (right, asked)


def sized(policy: str, turn: int, ttft_s: float, scenario: str = "reordered", **report) -> Outcome:
    mode = policy if policy in ("off", "exact") else "identical"
    found = ReuseReport(mode, 4087, ttft_s=ttft_s, **report)
    return Outcome(scenario, 4096, policy, 0, turn, found, right=turn == 0)


SIZED = [
    sized("off", 0, 99.0),
    sized("off", 1, 10.0),
    sized("off", 2, 20.0),
    sized("off", 3, 12.0),
    *(sized("exact", turn, 5.0) for turn in (1, 2, 3)),
    sized("identical", 0, 50.0, compute_ratio=0.05),
    *(sized("identical", turn, 1.0, compute_ratio=0.05, declined="so | so") for turn in (1, 2, 3)),
]


def test_ratios_are_taken_within_a_round_and_the_first_is_left_out() -> None:
    off, exact, identical = summarize(SIZED)
    assert identical["ttft_ratio"] == (12.0, 11.0, 16.0), "10, 20 and 12 times, and not 12 over 1"
    assert identical["exact_ratio"] == (5.0, 5.0, 5.0) and off["ttft_ratio"] == (1.0, 1.0, 1.0)
    assert exact["ttft_ratio"].value == pytest.approx(2.4)
    assert identical["overhead"].value == pytest.approx(1 / 12 / 0.05)
    assert (identical.rounds, identical["prompt_tokens"].value, identical.note) == (3, 4087, "so | so")
    assert (off["ttft_s"], off.note) == ((12.0, 11.0, 16.0), "")
    assert off["accuracy"].value == 0, "an answer counts once, of the first timed round"


def test_a_policy_alone_has_no_ratio() -> None:
    (alone,) = summarize([sized("identical", 1, 1.0, compute_ratio=0.5)])
    assert alone["ttft_ratio"] is alone["exact_ratio"] is alone["overhead"] is None
    (untimed,) = summarize([sized("identical", 0, 1.0)])
    assert untimed.rounds == 0 and not untimed.figures


def test_of_several_cases_each_counts_with_the_median_of_its_rounds() -> None:
    times = {0: (1.0, 2.0, 9.0), 1: (4.0, 4.0, 4.0)}
    outcomes = [
        replace(sized("off", turn + 1, s), case=c) for c, found in times.items() for turn, s in enumerate(found)
    ]
    (row,) = summarize(outcomes)
    assert (row.cases, row.rounds, row["ttft_s"].value) == (2, 3, 3.0)
    assert 2.0 <= row["ttft_s"].low <= row["ttft_s"].high <= 4.0


def test_a_late_failure_leaves_the_figures_from_before() -> None:
    *_, identical = summarize(SIZED, [Failure("reordered", 4096, "identical", "out of memory")])
    assert identical.rounds == 3 and identical.note == "out of memory"
    *_, failed = summarize(SIZED, [Failure("reordered", 8192, "all", "beyond")])
    assert (failed.length, failed.policy, failed.figures) == (8192, "all", {})


def test_memory_decoding_and_divergence_are_read_from_the_report() -> None:
    audit = AuditResult(True, 0.25, 8)
    report = ReuseReport(
        "identical", 10, ttft_s=1, decode_s=2.0, output_tokens=9, kv_bytes=70, kv_retained_ratio=0.58, audit=audit
    )
    (row,) = summarize([Outcome("shared", 512, "identical", 0, 1, report, store_s=0.5, store_bytes=80)])
    found = {name: row[name].value for name in ("decode_tokens_per_s", "kv_bytes", "kv_kept_ratio", "kl_divergence")}
    assert found == {"decode_tokens_per_s": 4.0, "kv_bytes": 70, "kv_kept_ratio": 0.58, "kl_divergence": 0.25}
    assert (row["store_s"].value, row["store_bytes"].value) == (0.5, 80)
    assert Outcome("shared", 512, "x", 0, 1, ReuseReport("off", 1)).decode_tokens_per_s is None


def test_statistics_of_one_value_are_that_value() -> None:
    assert bootstrap([3.0, 3.0], max) == find_quartiles([3.0]) == estimate_mean({0: [3.0, 9.0]}, 0) == (3, 3, 3)
