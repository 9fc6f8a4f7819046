"""Policies: which settings are measured under which name, and the models that they are measured on.

A preset is the shape of a known model with random weights: time and memory do not depend on their values. Its
vocabulary is cut to the shipped tokenizer's, so embeddings and the output layer are smaller than the real model's.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from semsharekv_integrations.config import EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.errors import require
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel

FULL, EXACT, RETAINED = "off", "exact", "retained"
CHUNKS, ORDER = FLOORS = ("chunks", "order")  # what differs from a full prefill though nothing is approximate
UNGUARDED = 1e9  # a ``max_deviation`` that no KV exceeds, so that no full prefill answers in its place
UNBOUNDED = StoreConfig(max_bytes=2**62)
_PACKED = replace(UNBOUNDED, kv_bits=8)
_RETAINING = ReuseConfig(mode="semantic", retention_ratio=0.58)  # the paper's 42% less memory


class Policy(NamedTuple):
    """One line on what it does and where that comes from, and its settings."""

    about: str
    reuse: ReuseConfig
    store: StoreConfig = UNBOUNDED


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        FULL: Policy("A full prefill.", ReuseConfig(mode="off")),
        "rerun": Policy("A second full prefill: what differs from the first one is noise.", ReuseConfig(mode="off")),
        EXACT: Policy("The longest exact prefix, as every serving engine reuses it.", ReuseConfig(mode="exact")),
        "identical": Policy("This package's mode of that name.", ReuseConfig(mode="identical")),
        "semantic": Policy("This package's mode of that name.", ReuseConfig(mode="semantic")),
        RETAINED: Policy("As semantic, with 42% less KV kept for decoding.", _RETAINING),
        "packed": Policy("As identical, over KV stored in 8 bits.", ReuseConfig(mode="identical"), _PACKED),
        "paper": Policy("SemShareKV as far as it is known (arXiv 2509.24832).", ReuseConfig(mode="paper")),
        CHUNKS: Policy("A floor: a full prefill of the same prompt in two chunks.", ReuseConfig(mode="exact")),
        ORDER: Policy("A floor: a full prefill of the same documents in the stored order.", ReuseConfig(mode="off")),
    }
)
SETTINGS = tuple(field.name for field in fields(ReuseConfig) if field.name != "mode")


def make_configs(
    names: Iterable[str], settings: Mapping[str, Any] | None = None, policies: Mapping[str, Policy] = POLICIES
) -> dict[str, EngineConfig]:
    """Engine settings by policy, over a store without bounds. ``settings`` are for those that reuse off the prefix."""
    names, settings = list(names), dict(settings or {})
    for field, values, known in (("policies", names, policies), ("settings", settings, SETTINGS)):
        unknown = sorted(set(values) - set(known))
        require(not unknown, field, ", ".join(unknown), ", ".join(known))
    configs = {}
    for name in names:
        reuse = policies[name].reuse
        reuse = replace(reuse, **settings) if reuse.is_approximate else reuse
        configs[name] = EngineConfig(reuse=reuse, store=policies[name].store)
    return configs


def drop_guard(config: EngineConfig) -> EngineConfig:
    """``config`` without the deviation guard, since deviation of random weights means nothing."""
    reuse = config.reuse
    return replace(config, reuse=replace(reuse, max_deviation=UNGUARDED)) if reuse.is_approximate else config


@dataclass(frozen=True)
class Subject:
    """What is measured on."""

    name: str  # a path, hub id or preset
    model: PreTrainedModel  # with its weights, in evaluation mode
    tokenizer: Tokenizer  # the model's, or the shipped one
    is_random: bool = False  # whether the weights are random, so that no deviation and no answer means anything
    note: str = ""  # what a reader of the figures must know of it, perhaps nothing


SHAPES: Mapping[str, dict[str, Any]] = MappingProxyType(
    tomllib.loads((files("semsharekv_integrations") / "assets" / "shapes.toml").read_text(encoding="utf-8"))
)
REFERENCE = "reference"
PRESETS = (REFERENCE, *SHAPES)


def load_subject(name: str, device: str | None, dtype: str, seed: int) -> Subject:
    """A preset, or else the model in a folder or of a hub id; ``device`` None is CUDA if there is one, else the CPU."""
    if name in SHAPES:
        return _make_random(name, device, dtype, seed)
    source = NamedModel(REFERENCE_MODEL if name == REFERENCE else name, device, dtype, {})
    return Subject(source.name, source.load(), source.tokenizer)


def _make_random(name: str, device: str | None, dtype: str, seed: int) -> Subject:
    shape = dict(SHAPES[name])
    like, tokenizer = shape.pop("like"), NamedModel(REFERENCE_MODEL, None, "auto", {}).tokenizer
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # most CPUs compute bfloat16 many times slower
    usual = torch.bfloat16 if place.type == "cuda" else torch.float32
    kind = usual if dtype == "auto" else getattr(torch, dtype, None)
    require(isinstance(kind, torch.dtype), "dtype", dtype, "'auto' or a torch dtype such as 'bfloat16'")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(vocab_size=len(tokenizer), **ends, **shape)
    torch.manual_seed(seed)
    with place:
        model = AutoModelForCausalLM.from_config(config, dtype=kind).eval()
    note = (
        f"Random weights in the shape of {like}, with a vocabulary of {len(tokenizer)} tokens instead of its own. "
        "The deviation guard is off, since deviation of random weights means nothing; answers mean nothing either."
    )
    return Subject(name, model, tokenizer, is_random=True, note=note)
