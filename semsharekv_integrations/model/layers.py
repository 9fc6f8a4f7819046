"""What a model's code and configuration say: the name of its cache argument, its layers, what rules reuse out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import transformers
from packaging.version import Version
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from semsharekv_integrations.errors import UnsupportedModelError

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ATTENTION = {"sdpa", "eager"}  # take an explicit mask for any choice of rows
_CACHE_ARGUMENTS = ("past_key_values", "cache_params", "cache")  # the last one from transformers 5.24 on
_RENAMED_IN = Version("5.24")
_NO_DECODER = "not a causal language model"
PROMPT_LEARNING = (
    "a PEFT adapter of prompt learning ({}), whose virtual tokens stand before every pass; accepted are adapters of "
    "the layers, such as LoRA"
)


def require_decoder(config: PreTrainedConfig, name: str) -> None:
    """Refuse what the configuration says is no decoder; ``name`` is the model's.

    Raises:
        UnsupportedModelError: saying what it is.
    """
    masked, causal = (type(config) in kinds for kinds in (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING))
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is {_NO_DECODER} but an encoder-decoder ({_kind_of(config)})")
    looks_ahead = masked and (not causal or getattr(config, "is_decoder", None) is False)
    if looks_ahead and not _brings_decoder(config):
        raise UnsupportedModelError(f"{name} is {_NO_DECODER} but an encoder ({_kind_of(config)})")


def require_loadable_decoder(config: PreTrainedConfig, name: str) -> None:
    """As ``require_decoder``, and refuse what transformers knows no causal language model for."""
    require_decoder(config, name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not _brings_decoder(config):
        raise UnsupportedModelError(f"{name} is {_NO_DECODER} ({_kind_of(config)})")


def _brings_decoder(config: PreTrainedConfig) -> bool:
    """Whether the code of a causal language model lies beside the configuration."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _kind_of(config: PreTrainedConfig) -> str:
    return " or ".join(getattr(config, "architectures", None) or [config.model_type])


def require_no_prompt_learning(model: PreTrainedModel) -> None:
    """Refuse PEFT prompt learning.

    Raises:
        UnsupportedModelError: naming the method.
    """
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(f"{type(model).__name__} has {PROMPT_LEARNING.format(config.peft_type.value)}")


def cache_argument(model_class: type[PreTrainedModel]) -> str:
    """The name of the argument by which the forward of ``model_class`` takes its KV cache.

    Raises:
        UnsupportedModelError: if there is none.
    """
    parameters = inspect.signature(model_class.forward).parameters
    for name in _CACHE_ARGUMENTS:
        if name in parameters and (name != "cache" or _is_kv_cache(str(parameters[name].annotation))):
            return name
    raise UnsupportedModelError(f"{model_class.__name__} takes no KV cache: none of {', '.join(_CACHE_ARGUMENTS)}")


def _is_kv_cache(annotation: str) -> bool:
    """Whether an argument called ``cache`` is the KV cache; that of XLM is a dictionary of something else."""
    renamed = Version(transformers.__version__).release >= _RENAMED_IN.release
    return "Cache" in annotation or (renamed and "dict" not in annotation)


def find_layers(model: PreTrainedModel, config: PreTrainedConfig) -> Sequence[nn.Module]:
    """The modules that keys and values come from, in order.

    Raises:
        UnsupportedModelError: if there is no list of ``num_hidden_layers`` modules.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return list(module)
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers")


def windows_of(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """For each layer how many positions a token sees, itself included; None for all before it."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = window is not None and getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def require_reuse_off_prefix(model: PreTrainedModel, config: PreTrainedConfig, mode: str) -> None:
    """Refuse what the configuration already rules out.

    Raises:
        UnsupportedModelError: naming what was found.
    """
    name = type(model).__name__
    found = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if found:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(found)}; mode {mode!r} accepts {' and '.join(sorted(_LAYER_TYPES))}"
        )
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        raise UnsupportedModelError(f"{name} has multimodal rope (mrope_section); use mode='exact'")
    if config._attn_implementation not in _ATTENTION:
        raise UnsupportedModelError(
            f"{name} has attn_implementation {config._attn_implementation!r}; mode {mode!r} accepts "
            f"{' or '.join(map(repr, sorted(_ATTENTION)))}"
        )
