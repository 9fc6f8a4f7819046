"""Build a tiny random model of any causal type that transformers has."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

_TABLE = tomllib.loads(Path(__file__).with_name("survey.toml").read_text(encoding="utf-8"))
SIZES: Mapping[str, int] = _TABLE["sizes"]
TYPES: Mapping[str, dict[str, Any]] = _TABLE["types"]
VOCABULARY = SIZES["vocab_size"]  # tokens, of which the first are special and the last are no text's
LAYERS = SIZES["num_hidden_layers"]
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SPREAD = 0.2  # of weights; as models begin, all tokens look alike
SEED = 11


def build_tiny_model(model_type: str) -> PreTrainedModel:
    """A random float32 model of a causal type of transformers in evaluation mode, the same at every call."""
    config = build_tiny_config(model_type)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # no answer ends early
    spread_weights(model)
    return model


def build_tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of that type with everything small: windows shorter than prompts, each kind of layer there."""
    return _shrink(CONFIG_MAPPING[model_type], {})


def _shrink(kind: type[PreTrainedConfig], more: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration of that class; ``more`` are fields that stand above the rules, by name."""
    usual = vars(kind())
    more = {**TYPES.get(kind.model_type, {}), **more}
    changes: dict[str, Any] = {"is_decoder": True} if kind.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = usual.get(field.name)
        if isinstance(value, PreTrainedConfig):
            changes[field.name] = _shrink(type(value), more.get(field.name, {}))
        elif field.name in more:
            changes[field.name] = more[field.name]
        else:
            changes |= _shrink_field(field.name, value, usual)
    return kind(**{**more, **changes})


def _shrink_field(name: str, value: object, usual: Mapping[str, Any]) -> dict[str, Any]:
    """What takes the place of a field's usual value, by name; nothing where it stays."""
    if name.endswith(("_token_id", "_token_index")):
        return {name: SPECIAL.get(name, VOCABULARY - 1)} if isinstance(value, (int, list)) else {}
    if name == "num_key_value_heads":
        return {name: 4 if "kv_lora_rank" in usual else 2}
    if name == "tie_word_embeddings":  # else the last token of a prompt is the likeliest next one
        return {name: False}
    if isinstance(value, list) and len(value) == usual.get("num_hidden_layers"):
        kinds = list(dict.fromkeys(value))  # in the order in which they come
        return {name: list(islice(cycle(kinds), max(LAYERS, len(kinds))))}
    if name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return {name: SIZES[name]}
    return {}


@torch.no_grad()
def spread_weights(model: PreTrainedModel) -> None:
    """Make weights that begin near 0 larger, and those that begin alike unlike, so that every one of them matters."""
    for parameter in model.parameters():
        spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
        if spread < 1e-6:
            parameter.add_(torch.randn_like(parameter) * SPREAD)
        elif parameter.ndim > 1 and spread < SPREAD:
            parameter.mul_(SPREAD / spread)
