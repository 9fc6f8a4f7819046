"""Settings: every one has an effect, every bad one is refused by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from semsharekv_integrations import (
    AuditConfig,
    ContextWindowError,
    EngineConfig,
    ReuseConfig,
    SamplingConfig,
    SemShareEngine,
    StoreConfig,
)
from semsharekv_integrations.config import MODES, PRESETS, Mode
from semsharekv_integrations.request import GenerateOptions, Request
from tiny_models import STATEFUL, EngineMaker, make_model

PROMPT = "Report on Prorna in the Daily Courier."
CONFIGS = (ReuseConfig, StoreConfig, AuditConfig, EngineConfig, SamplingConfig)


def reused(engine: SemShareEngine) -> int:
    engine.generate(PROMPT, max_new_tokens=2)
    return engine.generate(PROMPT, max_new_tokens=2).report.reused_tokens


def reused_later(engine: SemShareEngine) -> int:
    engine.generate(PROMPT, max_new_tokens=2)
    engine.store._entries._clock = lambda: time.monotonic() + 100.0
    return engine.generate(PROMPT, max_new_tokens=2).report.reused_tokens


def reused_from_all(engine: SemShareEngine) -> int:
    engine.generate(PROMPT, max_new_tokens=2, namespace="all")
    return engine.generate(PROMPT, max_new_tokens=2).report.reused_tokens


def stored_bytes(tier: str) -> Callable[[SemShareEngine], float]:
    def count(engine: SemShareEngine) -> float:
        engine.generate(PROMPT, max_new_tokens=2)
        found = engine.stats()[f"store_{tier}bytes"]
        engine.close()
        return found

    return count


def reused_after_others(engine: SemShareEngine) -> int:
    """Of what was reused once, behind prompts that fill the store and never come back."""
    reused(engine)
    for number in range(8):
        engine.generate(f"{number} {FIRE} {number}", max_new_tokens=2)
    return engine.generate(PROMPT, max_new_tokens=2).report.reused_tokens


def prompt_of(start: str, *documents: str) -> str:
    return "\n\n".join([start, *documents, "Who was affected ?"])


FLOOD = "A flood hit the old town of Prorna in May , and the mayor said that 7 people were affected by it ."
REWORDED = FLOOD.replace("7 people", "9 people").replace("hit", "took").replace("said", "told us").replace(",", "but")
FIRE = "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs ."


def borrowing(*prompts: str) -> Callable[[SemShareEngine], tuple[object, ...]]:
    """All that the last of several prompts reused and cost, times left out."""

    def report(engine: SemShareEngine) -> tuple[object, ...]:
        found = [engine.generate(prompt, max_new_tokens=2).report for prompt in prompts][-1]
        counts = found.prefix_tokens, found.identical_tokens, found.fuzzy_tokens, found.recomputed_tokens
        return *counts, found.compute_ratio, found.deviation, found.declined, found.kv_retained_ratio

    return report


moved = borrowing(prompt_of("Read it .", FLOOD, FIRE), prompt_of("You are to answer now .", FIRE, FLOOD))
edited = borrowing(prompt_of("Read it .", FLOOD, FIRE), prompt_of("Read it .", FLOOD.replace("hit", "7"), FIRE))
similar = borrowing(prompt_of("Read it .", FLOOD, FIRE), prompt_of("You are to answer now .", REWORDED))


def reworded(engine: SemShareEngine) -> object:
    """What was read in other words, where any two sentences say the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semsharekv_integrations.reuse.rewording.say_the_same", lambda asked, stored: True)
        engine.generate(prompt_of("Read it .", FLOOD, FIRE), max_new_tokens=2)
        prompt = "\n\n".join(["You are to answer now .", REWORDED, FIRE, "Why so ?"])
        report = engine.generate(prompt, max_new_tokens=2).report
        return report.substituted_tokens, report.substitutions, report.origins


def similar_long(engine: SemShareEngine) -> tuple[object, ...]:
    """Hashes are for long texts; here every text counts as one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semsharekv_integrations.reuse.matching.LONGEST_EXACT_TOKENS", 8)
        return similar(engine)


def audited(engine: SemShareEngine) -> bool:
    reused(engine)
    return bool(engine.stats()["audits"])


def suspends(engine: SemShareEngine) -> bool:
    logits = torch.eye(3)[:1]
    for _ in range(5):
        engine.auditor.record("default", logits, logits)
    for _ in range(15):
        engine.auditor.record("default", -logits, logits)
    return engine.auditor.suspends("default")


def window(engine: SemShareEngine) -> int | None:
    return engine.context_window


def sampled(**options: Any) -> Callable[[SemShareEngine], tuple[str, list[int]]]:
    def sample(engine: SemShareEngine) -> tuple[str, list[int]]:
        generation = engine.generate(PROMPT, **{"max_new_tokens": 12, **options})
        return generation.text, generation.token_ids

    return sample


def embedder(engine: SemShareEngine) -> str:
    return type(engine._load().planner._finder._index.embedder).__name__  # type: ignore[union-attr]


def compared_tokens(engine: SemShareEngine) -> int | None:
    engine.generate(PROMPT, max_new_tokens=9)
    audit = engine.generate(PROMPT, max_new_tokens=9).report.audit
    return audit and audit.tokens


def checkpoints(engine: SemShareEngine) -> list[int]:
    """Behind how many tokens a recurrent model keeps its state, in a store with the engine's settings."""
    tokenizer = engine._load().tokenizer
    model = make_model("mamba2", len(tokenizer), **STATEFUL["mamba2"])
    other = SemShareEngine(model, tokenizer, EngineConfig(ReuseConfig("exact"), store=engine.config.store))
    other.generate(PROMPT * 4, max_new_tokens=1)
    return [at for reference in other.store.fetch_all() for at in reference.checkpoints]


EAGER = {"max_compute_ratio": 1.0, "max_deviation": 100.0, "attention_ratio": 0.0, "relevance_ratio": 0.0}
IDENTICAL, SEMANTIC = {"mode": "identical", **EAGER}, {"mode": "semantic", **EAGER}
PAPER = {"mode": "paper", **EAGER, "min_similarity": 0.01, "retention_ratio": 1.0}
NEAR = {**SEMANTIC, "min_similarity": 0.01, "min_run_tokens": 20}
FOLDER = "a folder of the engine's own"
# For every setting: its value, what shows its effect, and the settings that both engines have beside it.
EFFECTS: dict[tuple[type, str], tuple[Any, Callable[[SemShareEngine], object], Any]] = {
    (ReuseConfig, "mode"): ("off", reused, {}),
    (ReuseConfig, "min_prefix_tokens"): (999, reused, {}),
    (ReuseConfig, "embedder"): ("some/model", embedder, {"mode": "semantic"}),
    (ReuseConfig, "budget"): (0.9, moved, {**IDENTICAL, "attention_ratio": None}),
    (ReuseConfig, "min_run_tokens"): (40, moved, IDENTICAL),
    (ReuseConfig, "boundary_tokens"): (5, moved, IDENTICAL),
    (ReuseConfig, "edit_tokens"): (7, edited, IDENTICAL),
    (ReuseConfig, "tail_tokens"): (40, moved, IDENTICAL),
    (ReuseConfig, "attention_ratio"): (0.3, moved, {**IDENTICAL, "attention_ratio": None}),
    (ReuseConfig, "attention_depth"): (0.3, moved, {**IDENTICAL, "attention_ratio": 0.3}),
    (ReuseConfig, "relevance_ratio"): (0.5, moved, {**IDENTICAL, "boundary_tokens": 2}),
    (ReuseConfig, "deviation_ratio"): (0.5, similar, PAPER),
    (ReuseConfig, "final_share"): (0.1, moved, {**IDENTICAL, "attention_ratio": 0.5}),
    (ReuseConfig, "full_layers"): (2, similar, PAPER),
    (ReuseConfig, "max_deviation"): (1e-6, similar, PAPER),
    (ReuseConfig, "max_compute_ratio"): (0.01, moved, IDENTICAL),
    (ReuseConfig, "fuzzy"): (False, similar, PAPER),
    (ReuseConfig, "min_similarity"): (0.999, reworded, NEAR),
    (ReuseConfig, "report_substitutions"): (True, reworded, NEAR),
    (ReuseConfig, "report_origins"): (True, reworded, NEAR),
    (ReuseConfig, "min_token_similarity"): (0.999, similar, PAPER),
    (ReuseConfig, "guard_facts"): (True, similar, PAPER),
    (ReuseConfig, "lsh_bits"): (8, similar_long, {**PAPER, "min_token_similarity": 0.3}),
    (ReuseConfig, "rotate_keys"): (False, moved, {**IDENTICAL, "attention_ratio": None}),
    (ReuseConfig, "retention_ratio"): (0.3, moved, IDENTICAL),
    (ReuseConfig, "retention_final_share"): (0.1, moved, {**IDENTICAL, "retention_ratio": 0.5}),
    (StoreConfig, "max_bytes"): (1, reused, {}),
    (StoreConfig, "host_max_bytes"): (2**30, reused, {"max_bytes": 0}),
    (StoreConfig, "directory"): (FOLDER, stored_bytes("disk_"), {}),
    (StoreConfig, "disk_max_bytes"): (1, stored_bytes("disk_"), {"directory": FOLDER}),
    (StoreConfig, "kv_bits"): (8, stored_bytes(""), {}),
    (StoreConfig, "eviction"): ("lru", reused_after_others, {"max_bytes": 30_000}),
    (StoreConfig, "ttl_s"): (50.0, reused_later, {}),
    (StoreConfig, "shared_namespace"): ("all", reused_from_all, {}),
    (StoreConfig, "checkpoint_tokens"): (16, checkpoints, {}),
    (AuditConfig, "sample_ratio"): (1.0, audited, {}),
    (AuditConfig, "min_agreement"): (0.2, suspends, {}),
    (AuditConfig, "tokens"): (3, compared_tokens, {"sample_ratio": 1.0}),
    (AuditConfig, "window"): (21, suspends, {}),
}
OPTION_EFFECTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_new_tokens": (3, {}),
    "stop": (["o"], {"temperature": 2.0, "seed": 5}),
    "temperature": (5.0, {"seed": 5}),
    "top_p": (0.01, {"seed": 5, "temperature": 2.0}),
    "top_k": (1, {"seed": 5, "temperature": 2.0}),
    "repetition_penalty": (9.0, {}),
    "seed": (6, {"seed": 5, "temperature": 2.0}),
}
SECTIONS = {ReuseConfig: "reuse", StoreConfig: "store", AuditConfig: "audit"}


@pytest.mark.parametrize(("config", "name"), EFFECTS)
def test_no_setting_is_dead(make_engine: EngineMaker, tmp_path: Path, config: type, name: str) -> None:
    value, effect, others = EFFECTS[config, name]
    mode = "identical" if name == "kv_bits" else "exact"  # unless it is a setting of reuse itself
    seen = []
    for settings in (others, {**others, name: value}):
        made = {key: tmp_path / f"{len(seen)}" if given == FOLDER else given for key, given in settings.items()}
        seen.append(effect(make_engine(mode, **{SECTIONS[config]: config(**made)})))
    assert seen[0] != seen[1]


@pytest.mark.parametrize("name", OPTION_EFFECTS)
def test_no_sampling_option_is_dead(make_engine: EngineMaker, name: str) -> None:
    value, others = OPTION_EFFECTS[name]
    engine = make_engine()
    assert sampled(**others)(engine) != sampled(**{**others, name: value})(engine)


def test_the_context_window_is_not_dead(make_engine: EngineMaker) -> None:
    engine = make_engine(max_context_tokens=4)
    assert window(engine) == 4 != window(make_engine())
    with pytest.raises(ContextWindowError):
        engine.generate(PROMPT)


def test_every_rule_is_a_setting() -> None:
    assert {field.name for field in fields(ReuseConfig)} == RULES | OF_EVERY_MODE


def test_no_setting_was_overlooked() -> None:
    for config in (ReuseConfig, StoreConfig, AuditConfig, SamplingConfig):
        assert set(BAD[config]) == {field.name for field in fields(config)}
    known = {*EFFECTS, *((SamplingConfig, name) for name in OPTION_EFFECTS), (EngineConfig, "max_context_tokens")}
    known |= {
        (EngineConfig, name) for name in (*SECTIONS.values(), "max_batch_size", "max_calls")
    }  # the last two: see test_calls
    known |= {(SamplingConfig, "prompt_lookup")}  # which changes no token: see test_drafts
    known |= {(StoreConfig, "libraries")}  # see test_libraries
    assert known == {(config, field.name) for config in CONFIGS for field in fields(config)}
    elsewhere = {
        "namespace",
        "documents",
        "session",
        "tools",
        "tool_choice",
        "json_schema",
        "chat_template_kwargs",
        "prompt_lookup",
    }  # test_prefix_reuse, _tools, _prompt, _drafts
    assert {*OPTION_EFFECTS, *elsewhere} == set(GenerateOptions.__annotations__)


SHARES = [-0.1, 1.1, "1", float("nan"), True]
BAD = {
    ReuseConfig: {
        "mode": ["fast", "", None, 3],
        "min_prefix_tokens": [0, -1, 1.5, "2", None, True],
        "embedder": ["", 3, True],
        "report_substitutions": [1, "yes", None],
        "report_origins": [1, "yes", None],
        "budget": SHARES,
        "min_run_tokens": [1, 0, 2.5, "8"],
        "boundary_tokens": [-1, 1.5, "2"],
        "edit_tokens": [-1, 1.5, "2"],
        "tail_tokens": [0, -1, 1.5],
        "attention_ratio": SHARES,
        "attention_depth": [0, *SHARES],
        "relevance_ratio": SHARES,
        "deviation_ratio": SHARES,
        "final_share": SHARES,
        "full_layers": [-1, 1.5, "2"],
        "max_deviation": [0, -1, float("nan"), float("inf"), "1"],
        "max_compute_ratio": SHARES,
        "fuzzy": [1, "yes"],
        "min_similarity": [0, *SHARES],
        "min_token_similarity": SHARES,
        "guard_facts": [0, "no"],
        "lsh_bits": [-8, 7, 8.5, "64"],
        "rotate_keys": [0, "no"],
        "retention_ratio": [0, *SHARES],
        "retention_final_share": [0, -1, float("nan"), float("inf"), "1"],
    },
    StoreConfig: {
        "checkpoint_tokens": [15, 0, 16.5, "64", True, None],
        "max_bytes": [-1, 0.5, None],
        "host_max_bytes": [-1, 0.5, None],
        "directory": ["", 3, True],
        "disk_max_bytes": [-1, 0.5, None],
        "ttl_s": [0, -1.0, "1", float("nan")],
        "kv_bits": [4, 0, "8", True],
        "eviction": ["fifo", "", None],
        "shared_namespace": ["", 3, True],
        "libraries": ["a/folder", 3, [""], [None], None, {"a/folder"}],
    },
    AuditConfig: {
        "sample_ratio": [-0.1, 1.1, None, "1"],
        "min_agreement": [-1, 2, "x"],
        "window": [0, 2.5, None],
        "tokens": [0, 1.5, None],
    },
    EngineConfig: {"max_context_tokens": [0, 1, -5, 2.5, "8"], "max_batch_size": [0, 1.5, "2", None]},
    SamplingConfig: {
        "max_new_tokens": [0, -1, 1.5, "3", None],
        "stop": [("",), ("a", 3), (None,)],
        "temperature": [-0.1, float("nan"), float("inf"), "1", None, 1e-40],
        "top_p": [0, 1.5, -1, "1", None],
        "top_k": [0, -1, 2.5, "4"],
        "repetition_penalty": [0, -1, "2", float("inf"), 1e-300, 1e300],
        "seed": [-1, 1.5, "7", 2**64],
        "prompt_lookup": [0, -1, 65, 1.5, "4", None],
    },
}


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [(config, name, value) for config, named in BAD.items() for name, values in named.items() for value in values],
)
def test_bad_values_are_refused_by_name(config: type, name: str, value: object) -> None:
    others = {} if config is not ReuseConfig or name in OF_EVERY_MODE else SEMANTIC
    with pytest.raises(ValueError, match=rf"{name} is .*; accepted is "):
        config(**{**others, name: value})


OF_EVERY_MODE = {"mode", "min_prefix_tokens", "embedder", "report_substitutions", "report_origins"}
RULES = {field.name for field in fields(ReuseConfig)} - OF_EVERY_MODE


@pytest.mark.parametrize("mode", ["off", "exact"])
@pytest.mark.parametrize("name", sorted(RULES))
def test_settings_of_other_modes_are_refused_by_name(mode: str, name: str) -> None:
    value, _, _ = EFFECTS[ReuseConfig, name]
    with pytest.raises(ValueError, match=rf"reuse\.{name} is .*; accepted is None in mode '{mode}'"):
        ReuseConfig(mode=mode, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["off", "exact", "identical"])
def test_an_embedder_is_refused_where_no_texts_are_compared(mode: str) -> None:
    with pytest.raises(ValueError, match="embedder"):
        ReuseConfig(mode=mode, embedder="some/model")  # type: ignore[arg-type]


OF_SOME_MODES: dict[str, tuple[str, ...]] = {
    "min_similarity": ("semantic", "paper"),
    **dict.fromkeys(("fuzzy", "min_token_similarity", "guard_facts", "lsh_bits"), ("paper",)),
}


@pytest.mark.parametrize("mode", PRESETS)
def test_rules_are_those_of_the_mode_with_what_was_given(mode: Mode) -> None:
    assert ReuseConfig(mode=mode).resolve() == PRESETS[mode]
    for name in RULES:
        value, _, _ = EFFECTS[ReuseConfig, name]
        if name == "deviation_ratio" and not PRESETS[mode].full_layers:
            continue  # needs a full layer
        if name == "budget" and mode == "paper":
            continue  # has shares of its own
        if mode not in OF_SOME_MODES.get(name, MODES) and value != getattr(PRESETS[mode], name):
            with pytest.raises(ValueError, match=rf"reuse.{name} is .*; accepted is None but in mode .*paper"):
                ReuseConfig(mode=mode, **{name: value})
            continue
        rules = ReuseConfig(mode=mode, **{name: value}).resolve()
        changed = {name: value, "budget": None} if name == "attention_ratio" else {name: value}
        assert rules == replace(PRESETS[mode], **changed), name


def test_a_budget_is_refused_where_it_would_say_nothing() -> None:
    for settings in ({"mode": "paper"}, {"mode": "identical", "attention_ratio": 0.1}, {"attention_ratio": 0.1}):
        with pytest.raises(ValueError, match=r"reuse.budget is 0.2; accepted is None with attention_ratio, and"):
            ReuseConfig(budget=0.2, **settings)
    for mode in ("off", "exact"):
        with pytest.raises(ValueError, match=rf"reuse\.budget is 0.2; accepted is None in mode '{mode}'"):
            ReuseConfig(mode=mode, budget=0.2)


@pytest.mark.parametrize("mode", ["identical", "semantic"])
def test_rules_that_need_a_full_layer_say_so(mode: Mode) -> None:
    with pytest.raises(ValueError, match=r"full_layers is 0; accepted is 1 or more where deviation_ratio"):
        ReuseConfig(mode=mode, deviation_ratio=0.1)
    with pytest.raises(ValueError, match="full_layers is 0"):
        ReuseConfig(mode="paper", full_layers=0, deviation_ratio=0.0)
    assert ReuseConfig(mode=mode, full_layers=1, deviation_ratio=0.1).resolve().full_layers == 1


def test_rounded_kv_is_refused_where_answers_are_exact() -> None:
    store = StoreConfig(kv_bits=8)
    for mode in ("exact", "off", "auto"):
        with pytest.raises(ValueError, match=rf"store.kv_bits is 8; accepted is None in mode '{mode}'"):
            EngineConfig(reuse=ReuseConfig(mode=mode), store=store)
    assert EngineConfig(reuse=ReuseConfig(mode="identical"), store=store).store.kv_bits == 8


def test_modes_that_compare_no_runs_index_none() -> None:
    indexed = {mode: ReuseConfig(mode=mode).indexed_run_tokens for mode in MODES}
    assert {mode for mode in MODES if indexed[mode] is None} == {"off", "exact", "paper"}
    assert all(indexed[mode] == PRESETS[mode].min_run_tokens for mode in MODES if indexed[mode] is not None)
    assert ReuseConfig(mode="semantic", min_run_tokens=5).indexed_run_tokens == 5
    assert [mode for mode in MODES if not ReuseConfig(mode=mode).is_approximate] == ["off", "exact"]


@pytest.mark.parametrize(
    "options",
    [
        {"namespace": ""},
        {"namespace": None},
        {"namespace": 3},
        {"session": 3},
        {"stop": 3},
        {"stop": ["a", None]},
        {"documents": "text"},
        {"documents": [3]},
        {"documents": {"id": 3}},
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}(\[.*\])? is .*; accepted is "):
        Request.of("x", options)  # type: ignore[arg-type]


def test_unknown_names_are_refused(make_engine: EngineMaker) -> None:
    with pytest.raises(ValueError, match=r"options is \['max_tokens'\]; accepted is max_new_tokens, "):
        make_engine().generate("x", max_tokens=3)
    for config in CONFIGS:
        with pytest.raises(TypeError, match="surprise"):
            config(surprise=1)


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_are_frozen(config: type) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(config(), fields(config)[0].name, 1)


def test_bad_arguments_of_other_methods(make_engine: EngineMaker) -> None:
    engine = make_engine()
    for call in (
        lambda: engine.warm(["x"], namespace=""),
        lambda: engine.warm(["x"], ttl_s=-1),
        lambda: engine.warm("x"),
        lambda: engine.forget("d", namespace=""),
        lambda: engine.clear(""),
        lambda: engine.clear(session="s"),
    ):
        with pytest.raises(ValueError, match="; accepted is "):
            call()
