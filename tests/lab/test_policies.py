"""Policies and presets: settings reach what reuses KV off the prefix, and shapes are those of the real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods import METHODS
from semsharekv_integrations.lab import policies
from semsharekv_integrations.lab.policies import POLICIES, make_configs
from shapes import drop_guard, load_preset


def test_packed_differs_from_identical_in_how_kv_is_stored_alone() -> None:
    configs = make_configs(["identical", "packed"])
    assert configs["packed"].reuse == configs["identical"].reuse
    assert (configs["packed"].store.kv_bits, configs["identical"].store.kv_bits) == (8, None)


def test_settings_go_to_approximate_policies_alone() -> None:
    configs = make_configs(METHODS, {"attention_ratio": 0.25}, METHODS)
    for name, policy in METHODS.items():
        reuse = configs[name].reuse
        expected = 0.25 if reuse.is_approximate else None
        assert replace(reuse, attention_ratio=policy.reuse.attention_ratio) == policy.reuse
        assert reuse.attention_ratio == expected and policy.about
    with pytest.raises(ValueError, match="policies is 'foo'; accepted is off, rerun, exact"):
        make_configs(["off", "foo"])
    with pytest.raises(ValueError, match="settings is 'atention_ratio'; accepted is"):
        make_configs(["off"], {"atention_ratio": 1})


def test_the_guard_is_dropped_where_there_is_one_alone() -> None:
    for name, config in make_configs(POLICIES).items():
        free = drop_guard(config).reuse
        assert config.reuse.max_deviation is None and (free.max_deviation is not None) == free.is_approximate
        assert replace(free, max_deviation=None) == config.reuse
        assert (free.retention_ratio is not None) == (name == policies.RETAINED)


@pytest.mark.parametrize(
    ("name", "vocab_size", "copies", "parameters"),
    [("qwen-0.5b", 151_936, 1, 494_032_768), ("llama-8b", 128_256, 2, 8_030_261_248)],
)
def test_presets_have_the_sizes_of_the_real_models(name: str, vocab_size: int, copies: int, parameters: int) -> None:
    found = load_preset(name, "meta", "bfloat16", 0)
    config = found.model.config
    cut = copies * (vocab_size - config.vocab_size) * config.hidden_size
    assert sum(p.numel() for p in found.model.parameters()) + cut == parameters
    assert load_preset(name, "meta", "auto", 0).model.dtype == torch.float32, "on what is no GPU"
    assert found.model.dtype == torch.bfloat16 and str(config.vocab_size) in found.note
    with pytest.raises(ValueError, match="dtype is 'foo'; accepted is 'auto' or a torch dtype"):
        load_preset(name, "meta", "foo", 0)
