"""Tiny random models of several architectures, with odd and mutually different sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from semsharekv_integrations import SemShareEngine

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Names of architectures, each with what its config needs beyond SIZES. Windows are shorter than test prompts.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 9},
    "gemma3_text": {"head_dim": 16, "sliding_window": 9},
    "phi3": {"pad_token_id": 2, "sliding_window": 9},
    "olmo2": {},
    "granite": {},
    "gpt_neox": {},
    "stablelm": {},
}
EngineMaker = Callable[..., SemShareEngine]


def make_model(architecture: str, vocab_size: int, **changes: Any) -> PreTrainedModel:
    """A random float32 model; the same weights at every call."""
    torch.manual_seed(11)
    sizes = {**SIZES, "bos_token_id": 0, "eos_token_id": 1, **ARCHITECTURES.get(architecture, {}), **changes}
    config = CONFIG_MAPPING[architecture](vocab_size=vocab_size, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # the default initialization is so small that all tokens look alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model
