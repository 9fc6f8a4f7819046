"""Settings: every one has an effect, every bad one is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
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
from semsharekv_integrations.request import GenerateOptions, Request
from tiny_models import EngineMaker

PROMPT = "Report on Prorna in the Daily Courier."
CONFIGS = (ReuseConfig, StoreConfig, AuditConfig, EngineConfig, SamplingConfig)


def reused(engine: SemShareEngine) -> int:
    engine.generate(PROMPT, max_new_tokens=2)
    return engine.generate(PROMPT, max_new_tokens=2).report.reused_tokens


def reused_later(engine: SemShareEngine) -> int:
    engine.store._clock = lambda: 0.0
    engine.generate(PROMPT, max_new_tokens=2)
    engine.store._clock = lambda: 100.0
    return engine.generate(PROMPT, max_new_tokens=2).report.reused_tokens


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


# For every setting: what it changes, the effect without and with it.
EFFECTS: dict[tuple[type, str], tuple[Any, Callable[[SemShareEngine], object], Any]] = {
    (ReuseConfig, "mode"): ("off", reused, {}),
    (ReuseConfig, "min_prefix_tokens"): (999, reused, {}),
    (StoreConfig, "max_bytes"): (1, reused, {}),
    (StoreConfig, "ttl_s"): (50.0, reused_later, {}),
    (AuditConfig, "sample_ratio"): (1.0, audited, {}),
    (AuditConfig, "min_agreement"): (0.2, suspends, {}),
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
def test_no_setting_is_dead(make_engine: EngineMaker, config: type, name: str) -> None:
    value, effect, others = EFFECTS[config, name]
    with_it = make_engine(**{SECTIONS[config]: config(**{name: value}, **others)})
    assert effect(make_engine()) != effect(with_it)


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


def test_no_setting_was_overlooked() -> None:
    known = {*EFFECTS, *((SamplingConfig, name) for name in OPTION_EFFECTS), (EngineConfig, "max_context_tokens")}
    known |= {(EngineConfig, name) for name in SECTIONS.values()}
    assert known == {(config, field.name) for config in CONFIGS for field in fields(config)}
    options = {*OPTION_EFFECTS, "namespace", "documents", "session"}  # the last three: see test_prefix_reuse
    assert options == set(GenerateOptions.__annotations__)


BAD = {
    ReuseConfig: {"mode": ["semantic", "fast", None], "min_prefix_tokens": [0, -1, 1.5, "2", None, True]},
    StoreConfig: {"max_bytes": [-1, 0.5, None], "ttl_s": [0, -1.0, "1", float("nan")]},
    AuditConfig: {"sample_ratio": [-0.1, 1.1, None, "1"], "min_agreement": [-1, 2, "x"], "window": [0, 2.5, None]},
    EngineConfig: {"max_context_tokens": [0, 1, -5, 2.5, "8"]},
    SamplingConfig: {
        "max_new_tokens": [0, -1, 1.5, "3", None],
        "stop": [("",), ("a", 3), (None,)],
        "temperature": [-0.1, float("nan"), float("inf"), "1", None],
        "top_p": [0, 1.5, -1, "1", None],
        "top_k": [0, -1, 2.5, "4"],
        "repetition_penalty": [0, -1, "2", float("inf")],
        "seed": [-1, 1.5, "7", 2**64],
    },
}


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [(config, name, value) for config, named in BAD.items() for name, values in named.items() for value in values],
)
def test_bad_values_are_refused_by_name(config: type, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*; accepted is "):
        config(**{name: value})


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
    with pytest.raises(ValueError, match=rf"{name} is .*; accepted is "):
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
