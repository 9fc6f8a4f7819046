"""Models to measure on: the reference model, any that transformers can load, and shapes of known models.

A preset is the shape of a known model with random weights: time and memory do not depend on their values. Its
vocabulary is cut to the shipped tokenizer's, so embeddings and the output layer are smaller than the real model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config
from transformers import PreTrainedTokenizerBase as Tokenizer

from semsharekv_integrations.checks import require
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel

REFERENCE = "reference"


@dataclass(frozen=True)
class Shape:
    """A known model's sizes.

    Attributes:
        like: whose they are.
        config: the configuration's class.
        sizes: its fields, without the vocabulary.
    """

    like: str
    config: type[PretrainedConfig]
    sizes: Mapping[str, Any]


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "qwen-0.5b": Shape(
            "Qwen2.5-0.5B",
            Qwen2Config,
            {
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
                "tie_word_embeddings": True,
            },
        ),
        "llama-8b": Shape(
            "Llama-3.1-8B",
            LlamaConfig,
            {
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500_000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                "tie_word_embeddings": False,
            },
        ),
    }
)
PRESETS = (REFERENCE, *SHAPES)


@dataclass(frozen=True)
class Subject:
    """What is measured on.

    Attributes:
        name: a path, hub id or preset.
        model: with its weights, in evaluation mode.
        tokenizer: the model's, or the shipped one.
        is_random: whether the weights are random, so that no deviation means anything.
        note: what a reader of the figures must know of it, perhaps nothing.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    is_random: bool
    note: str


def load(name: str, device: str | None, dtype: str, seed: int) -> Subject:
    """A preset, or else a model of that name.

    Args:
        name: one of ``PRESETS``, a folder or a hub id.
        device: None for CUDA if there is one, else the CPU.
        dtype: a torch dtype's name, or ``auto`` for the model's own; of a random one bfloat16 on CUDA, else float32,
            since most CPUs compute bfloat16 many times slower.
        seed: of random weights.

    Raises:
        ModelLoadError: if there is no such model.
        ValueError: if there is no such dtype.
    """
    if name in SHAPES:
        return _random(name, device, dtype, seed)
    source = NamedModel(REFERENCE_MODEL if name == REFERENCE else name, device, dtype, {})
    return Subject(source.name, source.load(), source.tokenizer, False, "")


def _random(name: str, device: str | None, dtype: str, seed: int) -> Subject:
    shape, tokenizer = SHAPES[name], NamedModel(REFERENCE_MODEL, None, "auto", {}).tokenizer
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    usual = torch.bfloat16 if place.type == "cuda" else torch.float32
    kind = usual if dtype == "auto" else getattr(torch, dtype, None)
    require(isinstance(kind, torch.dtype), "dtype", dtype, "'auto' or a torch dtype such as 'bfloat16'")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = shape.config(vocab_size=len(tokenizer), **ends, **shape.sizes)
    torch.manual_seed(seed)
    with place:
        model = AutoModelForCausalLM.from_config(config, dtype=kind).eval()
    return Subject(name, model, tokenizer, True, _note(shape, len(tokenizer)))


def _note(shape: Shape, vocab_size: int) -> str:
    return (
        f"Random weights in the shape of {shape.like}, with a vocabulary of {vocab_size} tokens instead of its own. "
        "The deviation guard is off, since deviation of random weights means nothing; answers mean nothing either."
    )
