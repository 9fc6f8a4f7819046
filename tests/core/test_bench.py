"""The speed bench's parts: prompts of the length asked for, references anew for each call, ratios and aims."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.lab import presets, speed, speed_figures, speed_policies, speed_probes, speed_tables
from semsharekv_integrations.lab.presets import Subject
from semsharekv_integrations.lab.speed import EVERY_POLICY, Failure, Results, Sample, SpeedBench
from semsharekv_integrations.lab.speed_figures import Row, Spread
from semsharekv_integrations.lab.speed_policies import PeerPolicy, Reading
from semsharekv_integrations.lab.speed_probes import LayerClock, LayerUse
from semsharekv_integrations.lab.speed_scenarios import SCENARIOS, Scenario, build
from semsharekv_integrations.lab.workloads import Query
from semsharekv_integrations.model.layers import decoder_layers
from semsharekv_integrations.model.prompt import PromptRenderer
from tiny_models import make_model

Builder = Callable[[str, int], Scenario]
MODES = ("off", "exact", "identical")


@pytest.fixture(scope="module")
def subject(tokenizer: PreTrainedTokenizerBase) -> Subject:
    model = make_model("llama", len(tokenizer), max_position_embeddings=2048)
    return Subject("tiny", model, tokenizer, True, "Random weights.")


@pytest.fixture(scope="module")
def built(tokenizer: PreTrainedTokenizerBase) -> Builder:
    renderer = PromptRenderer(tokenizer)
    return lambda name, length: build(name, length, 3, lambda prompt: len(renderer.render(prompt, {}).token_ids))


def bench_of(subject: Subject, *names: str) -> SpeedBench:
    return SpeedBench(subject, speed_policies.makers(names, subject, 2))


@pytest.mark.parametrize("length", [350, 700])
@pytest.mark.parametrize("name", SCENARIOS)
def test_prompts_have_about_the_length_asked_for(name: str, length: int, built: Builder, subject: Subject) -> None:
    scenario = built(name, length)
    tokens = PromptRenderer(subject.tokenizer).render(scenario.target.prompt, scenario.target.documents)
    assert scenario.prompt_tokens == len(tokens.token_ids) and (scenario.name, scenario.length) == (name, length)
    assert 0 <= length - scenario.prompt_tokens < 90
    assert len(tokens.segments) == len(scenario.target.documents) >= 2, "every document stands in the prompt"
    assert built(name, length) == scenario


@pytest.mark.parametrize(
    ("name", "common"),
    [("reordered", 1.0), ("shared", 0.5), ("reworded_10", 0.0), ("reworded_50", 0.0), ("unlike", 0.0)],
)
def test_prompts_resemble_what_was_seen_as_their_names_say(name: str, common: float, built: Builder) -> None:
    scenario = built(name, 1500)
    (reference,) = scenario.references
    seen, asked = list(reference.documents.values()), list(scenario.target.documents.values())
    assert sum(text in seen for text in asked) == int(common * len(asked))
    assert seen[0] != asked[0], "an exact prefix holds no document"


def test_other_words_are_of_the_share_asked_for(built: Builder) -> None:
    for share in (0.1, 0.3, 0.5):
        scenario = built(f"reworded_{share:.0%}"[:-1], 1500)
        sentences = [
            [text.split(". ") for text in query.documents.values()] for query in (*scenario.references, scenario.target)
        ]
        pairs = [
            (old, new)
            for before, after in zip(*sentences, strict=True)
            for old, new in zip(before, after, strict=False)
        ]
        assert share - 0.12 < sum(old != new for old, new in pairs) / len(pairs) < share + 0.12


def test_a_next_turn_goes_on_from_the_last_reply(built: Builder) -> None:
    scenario = built("next_turn", 600)
    (reference,) = scenario.references
    assert scenario.target.prompt[:-1] == reference.prompt
    assert (reference.prompt[-1]["role"], scenario.target.prompt[-1]["role"]) == ("assistant", "user")


def test_what_is_too_short_or_unknown_is_refused(built: Builder) -> None:
    with pytest.raises(ValueError, match=r"length is 50; accepted is .* tokens or more in scenario 'shared'"):
        built("shared", 50)
    with pytest.raises(ValueError, match="scenario is 'foo'; accepted is one of next_turn, reordered"):
        built("foo", 500)


@pytest.mark.parametrize("name", ["reordered", "next_turn"])
def test_every_call_finds_the_references_and_nothing_else(name: str, built: Builder, subject: Subject) -> None:
    """Else the second round would find its own prompt, whole, as an exact prefix."""
    bench, scenario = bench_of(subject, *MODES), built(name, 400)
    results = bench.measure(scenario, 2)
    assert not results.failures
    assert [(s.round, s.policy) for s in results.samples] == [(turn, name) for turn in range(3) for name in MODES]
    reused = {policy: {s.reading.reused_tokens for s in results.samples if s.policy == policy} for policy in MODES}
    assert reused["off"] == {0} and all(len(counts) == 1 for counts in reused.values())
    assert max(reused["identical"]) > scenario.prompt_tokens / 2
    assert (max(reused["exact"]) > scenario.prompt_tokens / 2) == (name == "next_turn")
    assert max(reused["identical"]) < scenario.prompt_tokens - 5, "the new turn is computed"
    assert not any(bench.policies[policy].engine.store.references() for policy in MODES)
    assert not bench._filler.engine.store.references()


def test_rounds_are_told_apart_and_memory_is_measured_in_the_first(built: Builder, subject: Subject) -> None:
    calls: list[None] = []
    results = bench_of(subject, "off", "retained").measure(built("unlike", 300), 2, lambda: calls.append(None))
    assert len(calls) == len(results.samples) == 2 * 3
    for sample in results.samples:
        assert (sample.reading.peak_bytes is None) or sample.round == 0
        assert len(sample.reading.layers) == subject.model.config.num_hidden_layers
        if sample.policy == "off":
            assert {use.rows for use in sample.reading.layers} == {sample.prompt_tokens}
            assert sample.reading.store_bytes is None
        else:
            assert sample.reading.kv_retained_ratio == pytest.approx(0.58, abs=0.02)
            assert sample.reading.store_bytes > sample.reading.kv_bytes / 2


class Broken(PeerPolicy):
    """Fails from its second call on."""

    def __init__(self, error: Exception) -> None:
        self.calls = 0
        super().__init__("broken", lambda query: None)
        self.error = error

    def ask(self, query: Query) -> Reading:
        self.calls += 1
        if self.calls > 2:
            raise self.error
        return Reading(1.0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (SemShareError("too  much"), "too much"),
    ],
)
def test_a_policy_that_fails_is_named_and_the_others_go_on(
    error: Exception, reason: str, built: Builder, subject: Subject
) -> None:
    broken = Broken(error)
    bench = SpeedBench(subject, {"broken": lambda: broken, **speed_policies.makers(["off"], subject, 1)})
    results = bench.measure(built("unlike", 300), 3)
    assert results.failures == [Failure("unlike", 300, "broken", reason)]
    assert broken.calls == 3, "it is not asked again"
    assert sum(sample.policy == "off" for sample in results.samples) == 4


def test_a_bug_is_no_figure(built: Builder, subject: Subject) -> None:
    broken = Broken(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        SpeedBench(subject, {"broken": lambda: broken}).measure(built("unlike", 300), 3)


def test_references_that_cannot_be_made_fail_for_all(built: Builder, tokenizer, monkeypatch) -> None:
    small = make_model("llama", len(tokenizer), max_position_embeddings=256)
    bench = bench_of(Subject("small", small, tokenizer, True, ""), "off")
    results = bench.measure(built("unlike", 400), 1)
    (failure,) = results.failures
    assert failure.policy == EVERY_POLICY and "context window of 256" in failure.reason and not results.samples


def test_missing_peers_are_named(built: Builder, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("langchain_huggingface", "llama_index.llms.huggingface"):
        monkeypatch.setitem(sys.modules, module, None)
    bench = SpeedBench(subject, speed_policies.peer_makers(subject))
    results = bench.measure(built("unlike", 300), 1)
    assert [failure.policy for failure in results.failures] == [*speed_policies.peer_makers(subject)]
    assert all(failure.reason.startswith("not installed: l") for failure in results.failures)


def test_errors_of_peers_are_theirs() -> None:
    def fail(query: Query) -> None:
        raise KeyError("pad_token")

    with pytest.raises(SemShareError, match="Pipeline: KeyError: 'pad_token'"):
        PeerPolicy("Pipeline", fail).ask(Query([], {}))


def test_the_guard_is_off_on_random_weights_alone() -> None:
    for name in speed_policies.MODE_OF:
        free, guarded = (speed_policies.config_of(name, unguarded=unguarded).reuse for unguarded in (True, False))
        assert guarded.max_deviation is None and (free.max_deviation is not None) == free.is_approximate
        assert (free.retention_ratio is not None) == (name == "retained")


def test_layers_are_timed_until_decoding_begins(subject: Subject) -> None:
    model: PreTrainedModel = subject.model
    clock = LayerClock(decoder_layers(model, model.config), model.device)
    model(torch.arange(1, 8)[None])
    assert [use.rows for use in clock.read()] == [7] * 3 and all(use.seconds > 0 for use in clock.read())
    model(torch.arange(1, 5)[None])
    model(torch.tensor([[1]]))
    assert [use.rows for use in clock.read()] == [11] * 3, "single rows are decoding"
    clock.start()
    clock.close()
    model(torch.arange(1, 8)[None])
    assert [use.rows for use in clock.read()] == [0] * 3


def test_peak_memory_is_what_the_call_needed() -> None:
    num_bytes = 64 * 2**20
    said, peak = speed_probes.with_peak(lambda: float(torch.ones(num_bytes // 4).sum()), torch.device("cpu"))
    assert said == num_bytes / 4 and (peak is None or 0.9 * num_bytes < peak < 2 * num_bytes)
    assert speed_probes.with_peak(lambda: 3, torch.device("meta")) == (3, None)


@pytest.mark.parametrize(
    ("name", "vocab_size", "copies", "parameters"),
    [("qwen-0.5b", 151_936, 1, 494_032_768), ("llama-8b", 128_256, 2, 8_030_261_248)],
)
def test_presets_have_the_sizes_of_the_real_models(name: str, vocab_size: int, copies: int, parameters: int) -> None:
    found = presets.load(name, "meta", "bfloat16", 0)
    config = found.model.config
    cut = copies * (vocab_size - config.vocab_size) * config.hidden_size
    assert sum(p.numel() for p in found.model.parameters()) + cut == parameters
    assert presets.load(name, "meta", "auto", 0).model.dtype == torch.float32, "on what is no GPU"
    assert found.is_random and found.model.dtype == torch.bfloat16 and str(config.vocab_size) in found.note
    with pytest.raises(ValueError, match="dtype is 'foo'; accepted is 'auto' or a torch dtype"):
        presets.load(name, "meta", "foo", 0)


def sample(policy: str, turn: int, ttft_s: float, scenario: str = "reordered", length: int = 4096, **reading) -> Sample:
    return Sample(scenario, length, length - 9, policy, turn, Reading(ttft_s, **reading))


HAND_MADE = [
    sample("off", 0, 99.0),
    sample("off", 1, 10.0, compute_ratio=1.0),
    sample("off", 2, 20.0, compute_ratio=1.0),
    sample("off", 3, 12.0, compute_ratio=1.0),
    sample("exact", 1, 5.0, compute_ratio=1.0),
    sample("exact", 2, 5.0, compute_ratio=1.0),
    sample("exact", 3, 5.0, compute_ratio=1.0),
    sample("identical", 0, 50.0, peak_bytes=70),
    sample("identical", 1, 1.0, compute_ratio=0.05, phases_s={"plan": 0.2, "forward": 0.8}),
    sample("identical", 2, 1.0, compute_ratio=0.05, phases_s={"plan": 0.4, "forward": 0.6, "audit": 0.3}),
    sample("identical", 3, 1.0, compute_ratio=0.05, phases_s={"plan": 0.3, "forward": 0.7}, declined="so | so"),
]


def test_ratios_are_taken_within_a_round_and_the_first_is_left_out() -> None:
    off, exact, identical = speed_figures.summarize(HAND_MADE)
    assert identical.speedup == Spread(12.0, 11.0, 16.0), "10, 20 and 12 times, and not 12 over 1"
    assert identical.speedup_over_exact == Spread(5.0, 5.0, 5.0) and off.speedup == Spread(1.0, 1.0, 1.0)
    assert exact.speedup is not None and exact.speedup.value == pytest.approx(2.4)
    assert identical.overhead_quotient == pytest.approx(1 / 12 / 0.05)
    assert (identical.rounds, identical.prompt_tokens, identical.peak_bytes) == (3, 4087, 70)
    assert (identical.note, off.peak_bytes, off.ttft_s) == ("so | so", None, Spread(12.0, 11.0, 16.0))


def test_a_policy_alone_has_no_ratio() -> None:
    (alone,) = speed_figures.summarize([sample("identical", 1, 1.0, compute_ratio=0.5)])
    assert alone.speedup is alone.speedup_over_exact is alone.overhead_quotient is None
    (untimed,) = speed_figures.summarize([sample("identical", 0, 1.0)])
    assert untimed.rounds == 0 and untimed.ttft_s is None


def test_a_late_failure_leaves_the_figures_from_before() -> None:
    *_, identical = speed_figures.summarize(HAND_MADE, [Failure("reordered", 4096, "identical", "out of memory")])
    assert identical.rounds == 3 and identical.note == "out of memory"


def test_phases_and_layers_are_medians_over_timed_rounds() -> None:
    assert speed_figures.phases_of([s for s in HAND_MADE if s.policy == "identical"]) == {
        "plan": pytest.approx(0.3),
        "forward": pytest.approx(0.7),
        "audit": 0.0,
    }
    uses = [((9.0, 9), (9.0, 9)), ((1.0, 4), (2.0, 3)), ((3.0, 4), (4.0, 3))]
    timed = [
        sample("off", turn, 1.0, layers=tuple(LayerUse(*use) for use in layers)) for turn, layers in enumerate(uses)
    ]
    assert speed_figures.layers_of(timed) == ([2.0, 3.0], [4.0, 3.0])
    assert speed_figures.layers_of([sample("off", 1, 1.0)]) == ([], [])


def row(scenario: str, policy: str, speedup: float, length: int = 4096, **fields) -> Row:
    return Row(scenario, length, length, policy, 3, speedup=Spread(speedup, speedup, speedup), **fields)


@pytest.mark.parametrize(
    ("measured", "met"),
    [
        (row("next_turn", "exact", 20.0), True),
        (row("next_turn", "exact", 19.9), False),
        (row("reordered", "identical", 10.0), True),
        (row("shared", "identical", 9.9), False),
        (row("reworded_30", "semantic", 6.25), True),
        (row("reworded_30", "semantic", 6.24), False),
        (row("unlike", "semantic", 1 / 1.029), True),
        (row("unlike", "semantic", 1 / 1.031), False),
    ],
)
def test_aims_are_met_or_missed(measured: Row, met: bool) -> None:
    (verdict,) = speed_figures.verdicts([measured], ["exact", "identical", "semantic"])
    assert (verdict.met, verdict.policy, verdict.length) == (met, measured.policy, 4096)
    assert not speed_figures.verdicts([measured], ["retained"])


@pytest.mark.parametrize(("kept", "met"), [(0.58, True), (0.584, True), (0.59, False), (1.0, False)])
def test_retention_is_held_against_the_kv_that_it_saves(kept: float, met: bool) -> None:
    speed_up, saved = speed_figures.verdicts([row("shared", "retained", 1.0, kv_retained_ratio=kept)], ["retained"])
    assert not speed_up.met and (saved.met, saved.figure) == (met, f"{1 - kept:.1%} less")


def test_aims_are_held_against_the_longest_prompts_up_to_5k() -> None:
    rows = [row("reordered", "identical", 1.0, length=length) for length in (512, 4096, 8192)]
    assert speed_figures.aim_length(rows) == 4096
    assert [verdict.length for verdict in speed_figures.verdicts(rows, ["identical"])] == [4096]
    assert speed_figures.aim_length([*rows, row("unlike", "x", 1.0, length=5000)]) == 5000
    assert speed_figures.aim_length(rows[2:]) is None and not speed_figures.verdicts(rows[2:], ["identical"])


ABOUT = {
    "command": "semsharekv bench",
    "commit": "0123456789abcdef",
    "uncommitted_changes": True,
    "model": "tiny",
    "dtype": "float32",
    "device": "a CPU",
    "threads": 1,
    "seed": 3,
    "repeats": 3,
    "seconds": 1.5,
    "note": "Random weights.",
}


def test_the_report_holds_losses_failures_and_where_it_comes_from() -> None:
    slow = [replace(s, policy="semantic", reading=replace(s.reading, ttft_s=100.0)) for s in HAND_MADE[8:]]
    failures = [Failure("reordered", 8192, EVERY_POLICY, "out of memory"), Failure("unlike", 512, "semantic", "broken")]
    text = speed_tables.report(ABOUT, Results([*HAND_MADE, *slow], failures), ["identical", "semantic"])
    for line in (
        "`semsharekv bench` at commit 0123456789ab with uncommitted changes: model tiny in float32 on a CPU, 1 thread,",
        "| reordered | 4096 | 4087 | semantic | 3 | 100000.0 [100000.0, 100000.0] | 0.12 [0.11, 0.16] | 0.05 [",
        "| reordered | 8192 | - | all | 0 | - | - | - | - | - | - | out of memory |",
        "| unlike | 512 | - | semantic | 0 | - | - | - | - | - | - | broken |",
        "| scenario | policy | plan | forward | audit |",
        "| reordered | identical | 300.0 | 700.0 | 0.0 |",
        "| reordered: first token 10 times faster than off | identical | 4096 | 12.00 times | met |",
        "| reordered: first token 10 times faster than off | semantic | 4096 | 0.12 times | missed |",
        "| so / so |",
        "Random weights.",
    ):
        assert line in text
    assert "None of the scenarios" in speed_tables.report(ABOUT, Results(), ["identical"])
    assert speed.UNTIMED == 0
