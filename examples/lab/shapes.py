"""Shapes of known models with random weights: time and memory do not depend on their values.

A shape's vocabulary is cut to the shipped tokenizer's, so embeddings and the output layer are smaller than the real
model's. Deviation of random weights means nothing, and neither do answers.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from semsharekv_integrations import EngineConfig
from semsharekv_integrations.errors import require
from semsharekv_integrations.lab.policies import Subject, load_subject
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel

UNGUARDED = 1e9  # a ``max_deviation`` that no KV exceeds, so that no full prefill answers in its place
SHAPES: Mapping[str, dict[str, Any]] = MappingProxyType(
    tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
)
REFERENCE = "reference"
PRESETS = (REFERENCE, *SHAPES)


def drop_guard(config: EngineConfig) -> EngineConfig:
    """``config`` without the deviation guard, since deviation of random weights means nothing."""
    reuse = config.reuse
    return replace(config, reuse=replace(reuse, max_deviation=UNGUARDED)) if reuse.is_approximate else config


def load_preset(name: str, device: str | None, dtype: str, seed: int) -> Subject:
    """A shape, or the built-in model; ``device`` None is CUDA if there is one, else the CPU."""
    return make_random(name, device, dtype, seed) if name in SHAPES else load_subject(None, device, dtype)


def make_random(name: str, device: str | None, dtype: str, seed: int) -> Subject:
    """A model in that shape, with the shipped tokenizer."""
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
    return Subject(name, model, tokenizer, note)
