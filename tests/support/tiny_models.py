"""Tiny random models of several architectures, with odd and mutually different sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
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
# Those that keep more than KV per token.
DELTA_NET = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
STATEFUL: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 16, "num_heads": 4, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 16,
        "linear_value_head_dim": 8,
        "mlp_only_layers": [0, 1, 2],
        **DELTA_NET,
    },
    "falcon_h1": {"head_dim": 16, "mamba_d_ssm": 64, **MAMBA2},
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 2, **MAMBA2},
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


_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
# Multimodal kinds, each with its vision part and what its text part needs beyond SIZES
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (_VISION, {"head_dim": 16, "sliding_window": 9}),
    "llava": (_VISION | {"model_type": "clip_vision_model"}, {"model_type": "llama"}),
    "idefics3": (_VISION, {"model_type": "llama"}),
    "mistral3": (_VISION | {"model_type": "pixtral", "head_dim": 16}, {"model_type": "mistral", "head_dim": 8}),
    "qwen2_vl": (_QWEN_VISION, _MROPE),
    "qwen3_vl": (_QWEN_VISION | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}, _MROPE | {"head_dim": 8}),
    "paligemma": (_VISION | {"model_type": "siglip_vision_model"}, {"model_type": "gemma", "head_dim": 8}),
    "llama4": (
        _VISION | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
        {"head_dim": 8, "intermediate_size_mlp": 36, "num_local_experts": 2, "attention_chunk_size": 16},
    ),
}


def make_multimodal(kind: str, vocab_size: int) -> PreTrainedModel:
    """A random float32 model of images and text, whose text part has the sizes of ``make_model``."""
    torch.manual_seed(11)
    vision, text = MULTIMODAL[kind]
    sizes = {**SIZES, "bos_token_id": 0, "eos_token_id": 1, "vocab_size": vocab_size, **text}
    places = {"image_token_id": 5, "image_token_index": 5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = CONFIG_MAPPING[kind](text_config=sizes, vision_config=dict(vision), **places)
    model = AutoModelForMultimodalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model
