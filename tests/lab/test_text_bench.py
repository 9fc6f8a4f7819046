"""Measuring on real text: full prefills that groups share, KL along their answers, floors, and grouped figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.kv import LayerKV, Reference
from semsharekv_integrations.lab.bench import Bench, Results, Study
from semsharekv_integrations.lab.figures import (
    Outcome,
    bootstrap,
    compute_mcnemar,
    estimate_mean,
    estimate_worst_share,
    summarize,
)
from semsharekv_integrations.lab.policies import Policy, Subject, make_configs
from semsharekv_integrations.lab.scenarios import Scenario
from semsharekv_integrations.lab.texts import Passage, Question, make_text_cases
from semsharekv_integrations.lab.traces import TracedEngine, measure_divergence
from semsharekv_integrations.report import ReuseReport
from tiny_models import make_model

RAW = ReuseConfig(
    mode="identical", boundary_tokens=0, edit_tokens=0, relevance_ratio=0.0, attention_ratio=0.0, max_deviation=1e9
)
TOWNS = ("Prorna", "Velmar", "Tolmin", "Ashford", "Kelso", "Brin", "Dora", "Elmot", "Farn", "Gorl", "Hale", "Ister")


def passage_of(number: int, town: str) -> Passage:
    cost, people = 200 + number, 50 + number
    sentences = (f"In {town}, the cost was {cost} crowns.", f"{town} is a town of {people} thousand people.")
    asked = (f"What was the cost in {town}?", f"How many thousand people live in {town}?", f"What is {town}?")
    golds = (str(cost), str(people), "town")
    questions = tuple(Question(text, (gold,)) for text, gold in zip(asked, golds, strict=True))
    return Passage(town, sentences, {0: f"The cost of {town} was {cost} crowns."}, questions)


PASSAGES = tuple(passage_of(*entry) for entry in enumerate(TOWNS))


@pytest.fixture(scope="module")
def subject(tokenizer) -> Subject:
    return Subject("tiny", make_model("llama", len(tokenizer), max_position_embeddings=4096), tokenizer)


def scenario_of(name: str = "text_reordered", groups: int = 2, questions: int = 3, max_new_tokens: int = 6) -> Scenario:
    cases = list(make_text_cases(name, groups, questions, 0, PASSAGES))
    return Scenario(name, cases, len(cases), max_new_tokens=max_new_tokens, judging="gold")


def bench_of(subject: Subject, *names: str, **more: ReuseConfig) -> Bench:
    policies = {name: Policy("", reuse) for name, reuse in more.items()}
    return Bench(subject, Study("", (), {**make_configs(names), **make_configs(more, policies=policies)}))


def measured(bench: Bench, scenario: Scenario) -> dict[str, list[Outcome]]:
    results = Results()
    for _, part in bench.measure(scenario):
        results.add(part)
    assert not results.failures
    found: dict[str, list[Outcome]] = {}
    for outcome in results.outcomes:
        found.setdefault(outcome.policy, []).append(outcome)
    return found


@pytest.mark.parametrize("name", ["text_reordered", "text_next_turn", "text_edited", "text_unlike"])
def test_a_shared_full_prefill_says_what_a_true_one_says(name: str, subject: Subject) -> None:
    """``rerun`` computes every prompt in full."""
    found = measured(bench_of(subject, "off", "rerun"), scenario_of(name))
    assert len(found["off"]) == len(found["rerun"]) >= 4
    for shared, true in zip(found["off"], found["rerun"], strict=True):
        assert shared.text == true.text and true.agrees and true.full_f1 == shared.full_f1 == 1
        assert shared.report.prompt_tokens == true.report.prompt_tokens and true.report.reused_tokens == 0
    firsts = {outcome.group: outcome for outcome in reversed(found["off"])}
    for outcome in found["off"]:
        is_first = outcome is firsts[outcome.group]
        assert (outcome.report.reused_tokens == 0) == is_first == outcome.has_costs


def test_a_policy_that_is_exact_has_no_divergence_and_no_difference(subject: Subject) -> None:
    found = measured(bench_of(subject, "off", "exact", "retained"), scenario_of("text_next_turn"))
    assert any(outcome.report.reused_tokens for outcome in found["exact"])
    for outcome in found["exact"]:
        assert len(outcome.kl) == 6 and 0 <= min(outcome.kl) <= max(outcome.kl) < 1e-5 and outcome.top1 == 1
        assert outcome.agrees and not outcome.stale
    assert {outcome.kl for outcome in (*found["off"], *found["retained"])} == {()}, "beside itself, and cut KV"
    full, exact, _ = summarize([outcome for outcomes in found.values() for outcome in outcomes])
    assert exact["difference_points"] == (0, 0, 0) and exact["mcnemar_p"].value == 1
    assert full["ttft_ratio"] == (1, 1, 1) and full["compute_ratio"] == (1, 1, 1)
    assert (exact.groups, exact.cases) == (2, 6)


class DamagingBench(Bench):
    """The bench over stored KV with noise of some strength."""

    strength = 0.0

    def make_references(self, case) -> list[Reference]:
        rng = torch.Generator().manual_seed(0)

        def damage(tensor: torch.Tensor) -> torch.Tensor:
            return tensor + self.strength * tensor.std() * torch.randn(tensor.shape, generator=rng)

        return [
            replace(found, layers=tuple(LayerKV(*map(damage, layer)) for layer in found.layers))
            for found in super().make_references(case)
        ]


def test_divergence_grows_with_damage_to_stored_kv(subject: Subject) -> None:
    means = []
    for strength in (0.0, 0.5, 4.0):
        bench = DamagingBench(subject, Study("", (), make_configs(["raw"], policies={"raw": Policy("", RAW)})))
        bench.strength = strength
        found = measured(bench, scenario_of(groups=1))["raw"]
        assert all(outcome.fired for outcome in found)
        means.append(np.mean([outcome.kl for outcome in found]))
    assert 0 < means[0] < means[1] < means[2]


@pytest.mark.parametrize("draft", [(), (5, 9, 14, 7)])
@pytest.mark.parametrize("mode", ["exact", "identical"])
def test_a_draft_is_read_behind_the_prompt_and_not_behind_the_answer(
    mode: str, draft: tuple[int, ...], subject: Subject
) -> None:
    """The cache holds the answer by then; and the call's own KV is stored as it would be without a draft."""
    engine, plain = (
        kind(subject.model, subject.tokenizer, EngineConfig(reuse=ReuseConfig(mode=mode)))
        for kind in (TracedEngine, SemShareEngine)
    )
    engine.draft = draft
    said = engine.generate("In Prorna , the cost was 12 crowns.", max_new_tokens=6)
    plain.generate("In Prorna , the cost was 12 crowns.", max_new_tokens=6)
    read = list(draft or said.token_ids)
    ids = engine._load().renderer.render("In Prorna , the cost was 12 crowns.", {}).token_ids
    full = engine._load().adapter.compute_logits(ids, np.array(read[:-1]))
    assert engine.traced.token_ids == read and len(engine.traced.logits) == len(read)
    torch.testing.assert_close(engine.traced.logits, full, atol=1e-4, rtol=1e-3)
    (one,), (other,) = (e.store.fetch_all() for e in (engine, plain))
    assert np.array_equal(one.token_ids, other.token_ids)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(one.layers, other.layers, strict=True))


def test_divergence_is_that_of_the_distributions() -> None:
    full, reused = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    kl, top1 = measure_divergence(full, reused)
    share = np.exp(1) / (1 + np.exp(1))
    assert kl == pytest.approx((0.5 * np.log(0.5 / share) + 0.5 * np.log(0.5 / (1 - share)), 0.0), abs=1e-6)
    assert top1 == 0.5 and measure_divergence(full, full).kl == pytest.approx((0.0, 0.0))


def test_floors_are_over_the_first_of_each_group_and_have_no_costs(subject: Subject) -> None:
    found = measured(bench_of(subject, "off", "chunks", "order"), scenario_of())
    for name in ("chunks", "order"):
        assert [(outcome.group, outcome.case) for outcome in found[name]] == [(0, 0), (1, 3)]
        assert not any(outcome.has_costs for outcome in found[name])
    for chunks, full in zip(found["chunks"], (found["off"][0], found["off"][3]), strict=True):
        assert chunks.report.reused_tokens == full.report.prompt_tokens // 2
        assert max(chunks.kl) < 1e-5 and chunks.text == full.text
    assert all(outcome.kl == () and outcome.report.reused_tokens == 0 for outcome in found["order"])
    assert any(outcome.report.prompt_tokens for outcome in found["order"])
    rows = {row.policy: row for row in summarize([outcome for outcomes in found.values() for outcome in outcomes])}
    assert rows["chunks"]["ttft_ratio"] is rows["chunks"]["compute_ratio"] is rows["order"]["answer_kl"] is None
    assert rows["order"].cases == 2 and rows["off"].cases == 6
    assert "order" not in measured(bench_of(subject, "off", "order"), scenario_of("text_system"))


def test_the_stored_order_is_what_the_order_floor_reads(subject: Subject) -> None:
    scenario = scenario_of(groups=1, questions=1)
    (case,) = scenario.cases
    swapped = replace(scenario, cases=[replace(case, target=case.in_order, in_order=case.target)])
    one, other = (measured(bench_of(subject, "off", "order"), s) for s in (scenario, swapped))
    assert (one["order"][0].text, one["off"][0].text) == (other["off"][0].text, other["order"][0].text)


def test_a_model_without_exact_reuse_computes_every_full_prefill(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, start = bench_of(subject, "off"), Bench._start_engine

    def refuse(self: Bench, config: EngineConfig):
        if config.reuse.mode == "exact":
            raise SemShareError("keeps no KV for each token")
        return start(self, config)

    monkeypatch.setattr(Bench, "_start_engine", refuse)
    assert all(outcome.report.reused_tokens == 0 for outcome in measured(bench, scenario_of())["off"])


def outcome_of(policy: str, case: int, group: int, right: bool, kl: float = 0.0) -> Outcome:
    report = ReuseReport("off" if policy == "off" else "identical", 100, ttft_s=1.0)
    return Outcome("text_x", policy, case, report, right=right, group=group, kl=(kl, kl), f1=float(right))


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (0, 5, 0.0625), (8, 2, 0.109375), (3, 3, 1.0), (1, 0, 1.0)]
)
def test_mcnemar_is_the_exact_binomial_test(better: int, worse: int, p: float) -> None:
    """5 of 5: 2 / 32. 2 of 10: 2 (1 + 10 + 45) / 1024. Pairs of which both are right or both wrong say nothing."""
    signs = [100.0] * better + [-100.0] * worse + [0.0] * 7
    assert compute_mcnemar(signs).value == pytest.approx(p)


def test_a_bootstrap_over_groups_is_as_wide_as_groups_are_few() -> None:
    """Eight values in two groups that agree within: whole groups are drawn, so that the mean is 0, 0.5 or 1."""
    values = [float(case < 4) for case in range(8)]
    assert estimate_mean(values, [case // 4 for case in range(8)]) == (0.5, 0.0, 1.0)
    apart = estimate_mean(values, list(range(8)))
    assert apart == estimate_mean(values) and apart.low > 0 and apart.high < 1
    spread = bootstrap([0.0, 1.0] * 50, np.mean, [case // 2 for case in range(100)])
    assert spread == (0.5, 0.5, 0.5), "groups that are alike in the mean leave no doubt"


def test_groups_of_unequal_size_weigh_by_their_cases() -> None:
    value, low, high = bootstrap([1.0, 0.0, 0.0, 0.0], np.mean, [0, 1, 1, 1])
    assert (value, low, high) == (0.25, 0.0, 1.0)
    assert bootstrap([1.0, 0.0, 0.0, 0.0], np.median, [0, 1, 1, 1]).value == 0


def test_the_worst_tenth_has_the_largest_values() -> None:
    assert estimate_worst_share([1.0] * 20).value == pytest.approx(0.1)
    assert estimate_worst_share([9.0, 1.0]).value == 0.9
    assert estimate_worst_share([0.0]).value == 0


def test_figures_on_text_are_over_every_case_whether_or_not_reuse_fired() -> None:
    outcomes = [outcome_of("off", case, case // 2, case < 3) for case in range(4)]
    outcomes += [outcome_of("x", case, case // 2, case < 1, kl=case) for case in range(4)]
    full, row = summarize(outcomes)
    assert (row.cases, row.groups) == (4, 2)
    assert row["difference_points"].value == -50 and row["mcnemar_p"].value == 0.5
    assert row["answer_kl"].value == 1.5 and row["worst_kl_share"].value == 0.5 and row["f1"].value == 0.25
    assert full["mcnemar_p"] is None and row["fired_share"].value == 0
