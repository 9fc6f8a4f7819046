"""The bench: references anew for each call, controls that agree with a full prefill, and failures that are named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

import drawn
from methods import CorruptingBench, make_corruptions
from semsharekv_integrations import EngineConfig, ReuseConfig
from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.lab import bench as lab_bench
from semsharekv_integrations.lab.bench import EVERY_POLICY, Bench, Results, Study
from semsharekv_integrations.lab.figures import Failure, Outcome
from semsharekv_integrations.lab.policies import Subject, make_configs
from semsharekv_integrations.lab.scenarios import Case, Scenario
from semsharekv_integrations.report import Generation, ReuseReport
from semsharekv_integrations.text.prompt import PromptRenderer
from shapes import drop_guard
from sized import make_sized_case
from tiny_models import make_model

CONTROLS = ("off", "rerun", "exact")
MODES = ("off", "exact", "identical")


@pytest.fixture(scope="module")
def subject(tokenizer) -> Subject:
    return Subject("tiny", make_model("llama", len(tokenizer), max_position_embeddings=4096), tokenizer)


def unguarded(*names: str) -> dict[str, EngineConfig]:
    """The deviation of random weights means nothing."""
    return {name: drop_guard(config) for name, config in make_configs(names).items()}


def bench_of(subject: Subject, *names: str, **fields) -> Bench:
    return Bench(subject, Study("", (), make_configs(names), **fields))


def case_of(name: str, seed: int = 0) -> Case:
    return next(drawn.make_cases(name, 1, seed, (2, 3)))


def sized(subject: Subject, name: str, length: int, rounds: int = 3, max_new_tokens: int = 2) -> Scenario:
    renderer = PromptRenderer(subject.tokenizer)
    case = make_sized_case(name, length, 3, lambda prompt: len(renderer.render(prompt, {}).token_ids))
    return Scenario(name, [case] * rounds, rounds, max_new_tokens)


def measured(bench: Bench, scenario: Scenario) -> Results:
    results = Results()
    for _, found in bench.measure(scenario):
        results.add(found)
    return results


def outcomes_of(bench: Bench, case: Case) -> list[Outcome]:
    return measured(bench, Scenario(case.scenario, [case], 1)).outcomes


@pytest.mark.parametrize("name", drawn.DRAWN)
def test_controls_agree_with_a_full_prefill(name: str, subject: Subject) -> None:
    scenario = Scenario(name, drawn.make_cases(name, 2, 1, (2, 3)), 2, max_new_tokens=8)
    outcomes = measured(bench_of(subject, *CONTROLS), scenario).outcomes
    assert [(o.case, o.policy) for o in outcomes] == [(case, policy) for case in range(2) for policy in CONTROLS]
    for outcome in outcomes:
        full = outcomes[outcome.case * len(CONTROLS)]
        assert outcome.agrees and outcome.text == full.text and outcome.text
        assert outcome.report.prompt_tokens == full.report.prompt_tokens and outcome.report.ttft_s > 0
        assert not outcome.fired and (outcome.report.reused_tokens == 0 or outcome.policy == "exact")


def test_a_policy_sees_the_references_and_no_other_case(subject: Subject) -> None:
    bench, case = bench_of(subject, "exact"), case_of("reordered")
    again = replace(case, target=case.references[0])
    for _ in range(2):
        full, exact = outcomes_of(bench, again)
        assert exact.report.reused_tokens == exact.report.prompt_tokens - 1 and full.report.reused_tokens == 0
        assert outcomes_of(bench, case_of("unlike"))[1].report.reused_tokens < 60
    assert not any(engine.store.references() for engine in bench.engines.values())


def test_every_reference_is_there_as_a_full_prefill_leaves_it(subject: Subject) -> None:
    bench = bench_of(subject)
    case = next(c for c in drawn.make_cases("shared", 20, 0, (2, 3)) if len(c.references) == 2)
    found = bench.make_references(case)
    assert len(found) == 2
    for query, reference in zip(case.references, found, strict=True):
        (alone,) = bench.make_references(replace(case, references=(query,)))
        assert np.array_equal(alone.token_ids, reference.token_ids)
        assert torch.equal(alone.layers[-1].values, reference.layers[-1].values)


@pytest.mark.parametrize("name", ["reordered", "next_turn"])
def test_every_call_finds_the_references_and_nothing_else(name: str, subject: Subject) -> None:
    """Else the second round would find its own prompt, whole, as an exact prefix."""
    bench = Bench(subject, Study("", (), unguarded(*MODES)))
    results = measured(bench, sized(subject, name, 400))
    assert not results.failures
    assert [(o.case, o.policy) for o in results.outcomes] == [(turn, name) for turn in range(3) for name in MODES]
    (prompt_tokens,) = {o.report.prompt_tokens for o in results.outcomes}
    reused = {policy: {o.report.reused_tokens for o in results.outcomes if o.policy == policy} for policy in MODES}
    assert reused["off"] == {0} and all(len(counts) == 1 for counts in reused.values())
    assert max(reused["identical"]) > prompt_tokens / 2
    assert (max(reused["exact"]) > prompt_tokens / 2) == (name == "next_turn")
    assert max(reused["identical"]) < prompt_tokens - 5, "the new turn is computed"
    assert not any(engine.store.references() for engine in (*bench.engines.values(), bench.filler))


def test_every_call_is_watched(subject: Subject) -> None:
    watched: list[tuple[str, int]] = []

    @contextmanager
    def watch(case: Case, policy: str, index: int) -> Iterator[dict[str, int]]:
        watched.append((policy, index))
        yield {"seen": index}

    bench = Bench(subject, Study("", (), unguarded("off", "retained"), watch=watch))
    scenario = sized(subject, "unlike", 300)
    scenario = replace(scenario, cases=[replace(case, answer=None) for case in scenario.cases])
    outcomes = measured(bench, scenario).outcomes
    assert sorted(watched) == [(policy, index) for policy in ("off", "retained") for index in range(3)]
    for outcome in outcomes:
        assert outcome.extra == {"seen": outcome.case} and outcome.right is None, "no answer is known"
        if outcome.policy == "off":
            assert outcome.store_bytes is outcome.store_s is None
        else:
            assert outcome.report.kv_retained_ratio == pytest.approx(0.58, abs=0.02)
            assert outcome.store_bytes > outcome.report.kv_bytes / 2 and outcome.store_s > 0


class Scripted:
    """An engine that says what it is told to, and raises what is an error."""

    config = EngineConfig(reuse=ReuseConfig(mode="off"))

    def __init__(self, *texts: str | Exception, **report) -> None:
        self.texts = list(texts)
        self.report = ReuseReport("identical", 100, ttft_s=1.0, **report)
        self.calls = 0

    def generate(self, prompt: object, **options: object) -> Generation:
        text = self.texts[min(self.calls, len(self.texts) - 1)]
        self.calls += 1
        if isinstance(text, Exception):
            raise text
        return Generation(text, [5], "stop", self.report)

    def clear(self) -> None:
        pass


def judged(subject: Subject, case: Case, own: Scripted, full: Scripted) -> Outcome:
    bench = bench_of(subject, judging="exact")
    bench.engines = {"off": full, "x": own}  # type: ignore[dict-item]
    return next(outcome for outcome in outcomes_of(bench, case) if outcome.policy == "x")


def test_answers_are_judged_by_their_words(subject: Subject) -> None:
    case = case_of("edited")
    assert case.stale is not None
    found = [judged(subject, case, Scripted(text), Scripted(f" {case.answer}")) for text in (case.answer, case.stale)]
    assert [(o.right, o.agrees, o.stale) for o in found] == [(True, True, False), (False, False, True)]
    other = judged(subject, case, Scripted(f"{case.answer} More."), Scripted(f"{case.answer} More.\n"))
    assert (other.right, other.agrees, other.stale) == (False, True, False)
    unopposed = judged(subject, replace(case, stale=None), Scripted(""), Scripted(""))
    assert unopposed.stale is None and unopposed.agrees and not unopposed.right
    assert (other.expected, other.case, other.policy) == (case.answer, 0, "x")
    alone = judged(subject, case, Scripted(""), Scripted(SemShareError("no")))
    assert alone.agrees is None, "the full prefill failed"


@pytest.mark.parametrize(
    ("report", "fired", "reused"),
    [
        ({}, False, 0),
        ({"prefix_tokens": 7}, False, 7),
        ({"identical_tokens": 8}, True, 8),
        ({"fuzzy_tokens": 9}, True, 9),
    ],
)
def test_reuse_fires_off_the_prefix_alone(report: dict[str, int], fired: bool, reused: int, subject: Subject) -> None:
    outcome = judged(subject, case_of("edited"), Scripted("", **report), Scripted(""))
    assert (outcome.fired, outcome.report.reused_tokens) == (fired, reused)
    assert drawn.is_counted(outcome) == fired
    assert drawn.is_counted(replace(outcome, report=ReuseReport("exact", 9)))


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
    assert lab_bench.is_answer(said, answer, values, "exact") is exact
    assert lab_bench.is_answer(said, answer, values, "mentions") is mentions
    assert lab_bench.is_answer(said, None, (), "exact") is None


def test_an_answer_is_as_long_as_its_scenario_allows(subject: Subject) -> None:
    for room in (3, 5):
        case = case_of("edited")
        (outcome,) = measured(bench_of(subject), Scenario("edited", [case], 1, room)).outcomes
        assert outcome.report.output_tokens == room


def test_a_corrupted_policy_runs_on_corrupted_references(subject: Subject) -> None:
    """Over zeroed KV a prompt that is nearly all prefix says something else."""
    configs = {"exact": EngineConfig(), "zeroed": EngineConfig(), "random": EngineConfig()}
    corrupt = make_corruptions(configs, seed=0)
    assert corrupt.keys() == {"zeroed", "random"}
    bench = CorruptingBench(subject, Study("", (), configs), corrupt)
    agreements: dict[str, list[bool]] = {name: [] for name in configs}
    for case in drawn.make_cases("reordered", 4, 0, (2, 3)):
        _, *others = outcomes_of(bench, replace(case, target=case.references[0]))
        for outcome in others:
            agreements[outcome.policy].append(outcome.agrees)
    assert all(agreements["exact"])
    assert not all(agreements["zeroed"]) and not all(agreements["random"])


def test_full_prefill_must_be_one_and_corruptions_must_have_a_policy(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"configs\['off'\].reuse.mode is 'exact'"):
        Bench(subject, Study("", (), {"off": EngineConfig(reuse=ReuseConfig(mode="exact"))}))
    with pytest.raises(ValueError, match="corrupt is 'zeroed'; accepted is policies of this run: off, exact"):
        CorruptingBench(subject, Study("", (), {"exact": EngineConfig()}), make_corruptions(["zeroed"], 0))


def test_a_store_without_room_for_the_references_is_refused(subject: Subject) -> None:
    small = make_configs(["exact"])["exact"]
    bench = Bench(subject, Study("", (), {"exact": replace(small, store=replace(small.store, max_bytes=9))}))
    with pytest.raises(ValueError, match=r"store\.max_bytes is 9; accepted is"):
        outcomes_of(bench, case_of("reordered"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (SemShareError("too  much"), "too much"),
    ],
)
def test_a_policy_that_fails_is_named_and_the_others_go_on(error: Exception, reason: str, subject: Subject) -> None:
    bench, broken = bench_of(subject, "off"), Scripted("", error)
    bench.engines["broken"] = broken  # type: ignore[assignment]
    results = measured(bench, sized(subject, "unlike", 300, rounds=4))
    assert results.failures == [Failure("unlike", "broken", reason)], "once"
    assert sum(outcome.policy == "off" for outcome in results.outcomes) == 4


def test_a_bug_is_no_figure(subject: Subject) -> None:
    bench = bench_of(subject)
    bench.engines["broken"] = Scripted("", RuntimeError("shapes differ"))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="shapes differ"):
        measured(bench, sized(subject, "unlike", 300, rounds=4))


def test_references_that_cannot_be_made_fail_for_all(subject: Subject) -> None:
    small = make_model("llama", len(subject.tokenizer), max_position_embeddings=256)
    results = measured(bench_of(replace(subject, model=small), "off"), sized(subject, "unlike", 400, rounds=2))
    (failure,) = results.failures
    assert failure.policy == EVERY_POLICY and "context window of 256" in failure.reason and not results.outcomes


def test_a_scenario_without_cases_says_why(subject: Subject) -> None:
    results = measured(bench_of(subject), Scenario("shared", (), 0, problem="beyond the window"))
    assert results.failures == [Failure("shared", EVERY_POLICY, "beyond the window")] and not results.outcomes


def test_policies_that_a_model_does_not_allow_are_named(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Bench, config: EngineConfig) -> None:
        raise SemShareError("no rotary positions")

    monkeypatch.setattr(Bench, "_start_engine", refuse)
    results = measured(bench_of(subject, "exact"), Scenario("x", (), 0))
    assert [(f.policy, f.reason) for f in results.failures] == [(p, "no rotary positions") for p in ("off", "exact")]
