"""What measures reuse: its controls agree with a full prefill, its ablations destroy, its figures are right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from semsharekv_integrations import EngineConfig, ReuseConfig
from semsharekv_integrations.core.plan import ReusePlan, build_plan, worthwhile
from semsharekv_integrations.kv import Generation, Reference, Run
from semsharekv_integrations.lab import extra, metrics, policies, quality, tables, workloads
from semsharekv_integrations.lab.quality import Bench, Outcome
from semsharekv_integrations.report import ReuseReport
from tiny_models import make_model

CONTROLS = ("off", "rerun", "exact")
OUTCOME = Outcome("edited", "off", "off", 0, 2, 100, "x", True, True, False, False, 0, 1.0, 2.0, None)


@pytest.fixture(scope="module")
def long_llama(tokenizer) -> PreTrainedModel:
    return make_model("llama", len(tokenizer), max_position_embeddings=4096)


def case_of(workload: str, seed: int = 0) -> workloads.Case:
    return next(workloads.make_cases(workload, 1, seed, (2, 3)))


@pytest.fixture
def references(long_llama, tokenizer) -> list[Reference]:
    return Bench(long_llama, tokenizer, {})._references(case_of("reordered"))


@pytest.mark.parametrize("workload", workloads.WORKLOADS)
def test_controls_agree_with_a_full_prefill(workload: str, long_llama, tokenizer) -> None:
    configs = policies.make_configs(CONTROLS)
    bench = Bench(long_llama, tokenizer, configs, max_new_tokens=8)
    cases = workloads.make_cases(workload, 2, 1, (2, 3))
    outcomes = [outcome for index, case in enumerate(cases) for outcome in bench.outcomes(index, case)]
    assert [(o.case, o.policy) for o in outcomes] == [(case, name) for case in range(2) for name in CONTROLS]
    for outcome in outcomes:
        full = outcomes[outcome.case * len(CONTROLS)]
        assert outcome.agrees and outcome.text == full.text and outcome.text
        assert outcome.prompt_tokens == full.prompt_tokens and outcome.ttft_s > 0 and not outcome.fired
        assert outcome.reused_tokens == 0 or outcome.policy == "exact"


def test_a_policy_sees_the_references_and_no_other_case(long_llama, tokenizer) -> None:
    bench = Bench(long_llama, tokenizer, policies.make_configs(["exact"]))
    case = case_of("reordered")
    again = replace(case, target=case.references[0])
    for index in range(2):
        full, exact = bench.outcomes(index, again)
        assert exact.reused_tokens == exact.prompt_tokens - 1 and full.reused_tokens == 0
        assert bench.outcomes(index, case_of("unlike"))[1].reused_tokens < 60
    assert not any(engine.store.references() for engine in bench.engines.values())


def test_every_reference_is_there_as_a_full_prefill_leaves_it(long_llama, tokenizer) -> None:
    bench = Bench(long_llama, tokenizer, {})
    case = next(c for c in workloads.make_cases("shared", 20, 0, (2, 3)) if len(c.references) == 2)
    found = bench._references(case)
    assert len(found) == 2
    for query, reference in zip(case.references, found, strict=True):
        (alone,) = bench._references(replace(case, references=(query,)))
        assert np.array_equal(alone.token_ids, reference.token_ids)
        assert torch.equal(alone.layers[-1].values, reference.layers[-1].values)


def said(text: str, **report) -> Generation:
    return Generation(text, [5], "stop", ReuseReport("identical", 100, **report))


def test_answers_are_judged_by_their_words() -> None:
    case = case_of("edited")
    assert case.stale is not None
    judged = [quality._outcome("x", 3, case, said(text), said(f" {case.answer}")) for text in (case.answer, case.stale)]
    assert [(o.right, o.agrees, o.stale) for o in judged] == [(True, True, False), (False, False, True)]
    other = quality._outcome("x", 3, case, said(f"{case.answer} More."), said(f"{case.answer} More.\n"))
    assert (other.right, other.agrees, other.stale) == (False, True, False)
    unopposed = quality._outcome("x", 3, replace(case, stale=None), said(""), said(""))
    assert unopposed.stale is None and unopposed.agrees and not unopposed.right


@pytest.mark.parametrize(
    ("report", "fired", "reused"),
    [
        ({}, False, 0),
        ({"prefix_tokens": 7}, False, 7),
        ({"identical_tokens": 8}, True, 8),
        ({"fuzzy_tokens": 9}, True, 9),
    ],
)
def test_reuse_fires_off_the_prefix_alone(report: dict[str, int], fired: bool, reused: int) -> None:
    found = said("", compute_ratio=0.4, ttft_s=0.2, declined="no", **report)
    outcome = quality._outcome("x", 3, case_of("edited"), found, said(""))
    assert (outcome.fired, outcome.reused_tokens) == (fired, reused)
    assert (outcome.policy, outcome.case, outcome.mode, outcome.prompt_tokens) == ("x", 3, "identical", 100)
    assert (outcome.compute_ratio, outcome.ttft_s, outcome.declined) == (0.4, 0.2, "no")
    assert outcome.num_documents in (2, 3)


def test_an_answer_has_room_to_be_too_long(long_llama, tokenizer) -> None:
    bench, case = Bench(long_llama, tokenizer, {}), case_of("edited")
    generation = bench._say("off", case, [])
    answer_tokens = len(tokenizer.encode(case.answer, add_special_tokens=False))
    assert generation.finish_reason == "stop" or len(generation.token_ids) == answer_tokens + quality.EXTRA_TOKENS


def test_a_corrupted_policy_runs_on_corrupted_references(long_llama, tokenizer) -> None:
    """Over zeroed KV a prompt that is nearly all prefix says something else."""
    configs = {"exact": EngineConfig(), "zeroed": EngineConfig(), "random": EngineConfig()}
    corrupt = policies.make_corruptions(configs, seed=0)
    assert corrupt.keys() == {"zeroed", "random"}
    bench = Bench(long_llama, tokenizer, configs, corrupt)
    agreements: dict[str, list[bool]] = {name: [] for name in configs}
    for case in workloads.make_cases("reordered", 4, 0, (2, 3)):
        _, *others = bench.outcomes(0, replace(case, target=case.references[0]))
        for outcome in others:
            agreements[outcome.policy].append(outcome.agrees)
    assert all(agreements["exact"])
    assert not all(agreements["zeroed"]) and not all(agreements["random"])


@pytest.mark.parametrize("name", ["zeroed", "random"])
def test_ablations_change_kv_and_nothing_else(name: str, references: list[Reference]) -> None:
    (reference,) = references
    before = [tensor.clone() for layer in reference.layers for tensor in layer]
    damaged = policies.make_corruptions([name], seed=1)[name](reference)
    assert replace(damaged, layers=reference.layers) == reference
    assert np.array_equal(damaged.token_ids, reference.token_ids)
    after = [tensor for layer in damaged.layers for tensor in layer]
    for old, given, new in zip(before, (t for layer in reference.layers for t in layer), after, strict=True):
        assert torch.equal(old, given), "the reference itself is left alone"
        assert (new.shape, new.dtype) == (old.shape, old.dtype) and not torch.equal(new, old)
        if name == "zeroed":
            assert not new.any()
        else:
            assert float(new.mean()) == pytest.approx(float(old.mean()), abs=0.1 * float(old.std()))
            assert float(new.std()) == pytest.approx(float(old.std()), rel=0.1)
            assert abs(float(torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1])) < 0.1


def test_noise_repeats_with_its_seed(references: list[Reference]) -> None:
    one, same, other = (policies.make_corruptions(["random"], s)["random"](references[0]) for s in (1, 1, 2))
    assert torch.equal(one.layers[0].keys, same.layers[0].keys)
    assert not torch.equal(one.layers[0].keys, other.layers[0].keys)


def test_packed_differs_from_identical_in_how_kv_is_stored_alone() -> None:
    configs = policies.make_configs(["identical", "packed"])
    assert configs["packed"].reuse == configs["identical"].reuse
    assert (configs["packed"].store.kv_bits, configs["identical"].store.kv_bits) == (8, None)


def test_settings_go_to_approximate_policies_alone() -> None:
    configs = policies.make_configs(policies.POLICIES, {"attention_ratio": 0.25})
    for name, policy in policies.POLICIES.items():
        reuse = configs[name].reuse
        expected = 0.25 if reuse.is_approximate else None
        assert replace(reuse, attention_ratio=policy.reuse.attention_ratio) == policy.reuse
        assert reuse.attention_ratio == expected and policy.about
    with pytest.raises(ValueError, match="policies is 'foo'; accepted is off, rerun, exact"):
        policies.make_configs(["off", "foo"])
    with pytest.raises(ValueError, match="settings is 'atention_ratio'; accepted is"):
        policies.make_configs(["off"], {"atention_ratio": 1})


def plan_of(name: str, reference: Reference) -> ReusePlan:
    """The plan for 40 stored tokens behind 10 new ones and before the question."""
    rules = policies.POLICIES[name].reuse.rules
    ids = np.concatenate([np.full(10, 3), reference.token_ids[:40], np.full(8, 4)])
    question = np.arange(len(ids)) >= 50
    plan = build_plan(ids, None, [Run(10, reference, 0, 40)], [], question, rules, 4, [(0, 50)])
    return worthwhile(plan, rules)


@pytest.mark.parametrize(
    ("name", "must", "deviating", "full_layers"), [("raw", 18, 0, 0), ("cacheblend", 18, 6, 1), ("epic", 34, 0, 0)]
)
def test_methods_of_the_field_compute_what_they_say(
    name: str, must: int, deviating: int, full_layers: int, references: list[Reference]
) -> None:
    plan = plan_of(name, references[0])
    assert plan.declined is None and plan.borrowed.sum() == 40
    assert (int(plan.must.sum()), plan.deviation_tokens, plan.full_layers) == (must, deviating, full_layers)
    assert plan.attention_tokens == 0 and not plan.relevant.any()
    assert plan.max_deviation == policies.UNGUARDED
    if name == "cacheblend":
        assert set(plan.shares) == {1.0}, "as many at every layer"


@pytest.mark.parametrize(
    ("said", "exact", "mentions"),
    [
        ("In Velmar, the cost was 12 million crowns.", True, True),
        ("It cost 12  Million crowns, they say.", False, True),
        ("It cost 312 million crowns.", False, False),
        ("", False, False),
    ],
)
def test_answers_in_any_words_are_judged_by_their_facts(said: str, exact: bool, mentions: bool) -> None:
    answer, values = "In Velmar, the cost was 12 million crowns.", ("12 million crowns",)
    assert quality.is_answer(said, answer, values, "exact") is exact
    assert quality.is_answer(said, answer, values, "mentions") is mentions
    assert quality.is_answer(said, None, (), "exact") is None


def test_a_summary_is_right_with_its_lines_in_any_order_and_has_rouge() -> None:
    pytest.importorskip("rouge_score")
    case = case_of("summaries")
    assert case.answer is not None
    lines = case.answer.splitlines()
    backward, one = "\n".join(reversed(lines)), lines[0]
    outcomes = [quality._outcome("x", 0, case, said(text), said(case.answer)) for text in (backward, one, "")]
    assert [outcome.right for outcome in outcomes] == [True, False, False]
    assert outcomes[0].rouge_l is not None and outcomes[1].rouge_l is not None
    assert 1 > outcomes[0].rouge_l > 0.3 and 0 < outcomes[1].rouge_l < 0.9 and outcomes[2].rouge_l == 0
    perfect = quality._outcome("x", 0, case, said(case.answer), said(one))
    assert perfect.rouge_l == 1 and perfect.rouge_l_to_full == outcomes[1].rouge_l
    other = quality._outcome("x", 0, case_of("edited"), said("a"), said("a"))
    assert other.rouge_l is None and other.rouge_l_to_full is None


def test_a_missing_package_is_named_with_how_to_get_it() -> None:
    with pytest.raises(extra.MissingPackageError, match=r"Telling needs no_such: pip install -e \"\.\[lab\]\""):
        extra.imported("no_such.part", "Telling")
    assert not extra.is_installed("no_such") and extra.is_installed("torch")


def test_an_answer_that_is_not_known_counts_for_agreement_alone() -> None:
    unknown = [replace(outcome, right=None, stale=None) for outcome in HAND_MADE]
    _, row = metrics.summarize(unknown)
    assert row.accuracy is row.full_accuracy is row.difference_points is None
    assert row.agreement is not None and row.agreement.value == 0.75
    assert "accuracy" not in tables.table([row])


def test_full_prefill_must_be_one_and_corruptions_must_have_a_policy(long_llama, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"configs\['off'\].reuse.mode is 'exact'"):
        Bench(long_llama, tokenizer, {"off": EngineConfig(reuse=ReuseConfig(mode="exact"))})
    with pytest.raises(ValueError, match="corrupt is 'zeroed'; accepted is policies of this run: off, exact"):
        Bench(long_llama, tokenizer, {"exact": EngineConfig()}, {"zeroed": policies.zeroed})


def test_a_store_without_room_for_the_references_is_refused(long_llama, tokenizer) -> None:
    small = policies.make_configs(["exact"])["exact"]
    bench = Bench(long_llama, tokenizer, {"exact": replace(small, store=replace(small.store, max_bytes=9))})
    with pytest.raises(ValueError, match=r"store\.max_bytes is 9; accepted is"):
        bench.outcomes(0, case_of("reordered"))


def full(case: int, right: bool, stale: bool | None = False, ttft_s: float = 2.0) -> Outcome:
    return replace(OUTCOME, case=case, right=right, stale=stale, ttft_s=ttft_s)


def reused(case: int, right: bool, **fields) -> Outcome:
    changes = {"fired": True, "compute_ratio": 0.1 * (case + 1), "ttft_s": 1.0, **fields}
    return replace(OUTCOME, policy="identical", mode="identical", case=case, right=right, **changes)


HAND_MADE = [
    full(0, True),
    full(1, True, ttft_s=4.0),
    full(2, False, stale=True),
    full(3, True, stale=None, ttft_s=6.0),
    full(4, False),
    reused(0, True),
    reused(1, False, stale=True, agrees=False),
    reused(2, False, stale=True),
    reused(3, True, stale=None),
    reused(4, True, fired=False, ttft_s=4.0, declined="too slow"),
]


def test_figures_are_over_the_cases_on_which_reuse_fired() -> None:
    first, row = metrics.summarize(HAND_MADE)
    assert (row.workload, row.policy, row.cases, row.fired, row.counted) == ("edited", "identical", 5, 4, 4)
    assert row.accuracy.value == 0.5 and row.full_accuracy == 0.75
    assert row.difference_points.value == -25
    assert -75 <= row.difference_points.low < -25 < row.difference_points.high <= 0
    assert row.agreement == metrics.wilson(3, 4)
    assert (row.stale_cases, row.full_stale_rate) == (3, pytest.approx(1 / 3))
    assert row.stale_rate == metrics.wilson(2, 3)
    assert row.compute_ratio.value == pytest.approx(0.25)
    assert row.ttft_ratio.value == 3.0  # of 2, 4, 2 and 6
    assert 2 <= row.ttft_ratio.low < 3 < row.ttft_ratio.high <= 6
    assert row.rest_ttft_ratio == (0.5, 0.5, 0.5)
    assert (first.policy, first.counted, first.accuracy.value, first.full_accuracy) == ("off", 5, 0.6, 0.6)
    assert first.difference_points == (0, 0, 0) and first.ttft_ratio == (1, 1, 1) and first.rest_ttft_ratio is None


def test_a_row_without_counted_cases_has_no_figures() -> None:
    _, row = metrics.summarize([full(0, True), reused(0, True, fired=False)])
    assert (row.cases, row.fired, row.counted, row.stale_cases) == (1, 0, 0, 0)
    for name in ("accuracy", "full_accuracy", "difference_points", "agreement", "stale_rate", "full_stale_rate"):
        assert getattr(row, name) is None
    assert row.compute_ratio is None and row.ttft_ratio is None and row.rest_ttft_ratio == (2, 2, 2)


def test_rows_keep_workloads_and_policies_apart() -> None:
    other = [replace(outcome, workload="turns", right=not outcome.right) for outcome in HAND_MADE]
    rows = metrics.summarize([*HAND_MADE, *other])
    assert [(r.workload, r.policy) for r in rows] == [(w, p) for w in ("edited", "turns") for p in ("off", "identical")]
    assert rows[:2] == metrics.summarize(HAND_MADE)
    assert rows[2].accuracy.value == pytest.approx(0.4) and rows[3].difference_points.value == 25


def test_the_table_shows_each_row_and_no_empty_column() -> None:
    lines = tables.table(metrics.summarize(HAND_MADE)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(lines) == 4 and len({len(row) for row in cells}) == 1
    assert "ROUGE-L" not in cells[0] and "KV kept" not in cells[0]
    assert cells[2][:3] == ["edited", "off", "all 5"] and cells[3][:3] == ["edited", "identical", "4 of 5"]
    assert cells[3][3].startswith("0.500 [0.150, 0.850]") and cells[3][5].startswith("-25.0 [")
    assert cells[3][6].startswith("0.750 [") and cells[3][7].startswith("0.667 [") and cells[3][8] == "0.333"
    assert cells[3][9].startswith("0.250 [") and cells[3][10].startswith("3.00 [") and cells[3][11] == "0.50"
    kept = [replace(outcome, kv_kept_ratio=0.4, rouge_l=0.5) for outcome in HAND_MADE]
    heading = tables.table(metrics.summarize(kept)).splitlines()[0]
    assert "ROUGE-L" in heading and "KV kept" in heading


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
    assert metrics.wilson(right, asked) == (right / asked, pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_a_paired_difference_has_the_interval_of_its_pairs() -> None:
    right, full_right = [True] * 360 + [False] * 40, [True] * 400
    value, low, high = metrics.paired_difference(right, full_right)
    assert value == -10
    half = 1.96 * 100 * (0.1 * 0.9 / 400) ** 0.5  # of a binomial share
    assert low == pytest.approx(-10 - half, abs=0.5) and high == pytest.approx(-10 + half, abs=0.5)
    assert metrics.paired_difference(right, full_right, seed=5) == metrics.paired_difference(right, full_right, seed=5)
    flipped = metrics.paired_difference(full_right, right)
    assert flipped == (10, pytest.approx(-high, abs=0.3), pytest.approx(-low, abs=0.3))
    # what counts is the pairs: the same shares with wrong answers in the same places differ by nothing
    assert metrics.paired_difference(right, right) == (0, 0, 0)


def test_an_interval_holds_its_share_and_stays_within_none_and_all() -> None:
    for asked in range(1, 130):
        for right in range(asked + 1):
            share, low, high = metrics.wilson(right, asked)
            assert 0 <= low <= share <= high <= 1, (right, asked)
