"""What a model's configuration, code and modules say: what it is, which cache it takes, its embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations.errors import UnsupportedModelError, is_whole
from semsharekv_integrations.kv import LayerKV
from semsharekv_integrations.model.packing import is_packed, is_wrapped

_PROMPT_LEARNING = "of prompt learning ({}), whose virtual tokens stand before every pass"
_BY_TEXT = "({}) that looks for its cue in the whole text, of which a pass behind a prefix sees the end alone"
INSTEAD = "use mode='exact', with engine.arrange to bring documents into the stored order"
_LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "mlp",
    "moe",
}  # all but attention keep nothing
_ATTENTION = {"sdpa", "eager"}  # take an explicit mask for any choice of rows
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size")
CHOSEN = "index_topk"  # where an indexer chooses so many tokens to attend to
_CACHE_ARGUMENTS = ("past_key_values", "cache_params", "cache")  # the last one from transformers 5.24 on
_RENAMED_IN = Version("5.24")
_NO_DECODER = "not a causal language model"


def require_decoder(config: PreTrainedConfig, name: str) -> None:
    """Raise ``UnsupportedModelError``, naming ``name``, if ``config`` is an encoder's or encoder-decoder's."""
    masked, causal = (type(config) in kinds for kinds in (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING))
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is {_NO_DECODER} but an encoder-decoder ({_name_kind(config)})")
    looks_ahead = masked and (not causal or getattr(config, "is_decoder", None) is False)
    if looks_ahead and not _has_own_decoder(config):
        raise UnsupportedModelError(f"{name} is {_NO_DECODER} but an encoder ({_name_kind(config)})")


def choose_auto_class(config: PreTrainedConfig, name: str) -> type[AutoModelForCausalLM | AutoModelForMultimodalLM]:
    """Return what loads ``config``: the class for causal models if it can, else that for models of images and sounds.

    Raises as ``require_decoder`` does, and if neither knows the configuration, nor the model's own code.
    """
    require_decoder(config, name)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or _has_own_decoder(config):
        return AutoModelForCausalLM
    if not is_multimodal(config):
        raise UnsupportedModelError(f"{name} is {_NO_DECODER} ({_name_kind(config)})")
    require_decoder(config.get_text_config(decoder=True), name)
    return AutoModelForMultimodalLM


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Return True if transformers has a model for ``config`` that reads text, and images or sounds beside it."""
    return type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def require_text_alone(model: PreTrainedModel) -> None:
    """Raise ``UnsupportedModelError`` if a multimodal model reads no text without images or sounds; it gets a token."""
    if not is_multimodal(model.config):
        return
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=find_input_device(model)))
    except Exception as error:  # whatever its code stumbles over where it expects an image
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UnsupportedModelError(f"{type(model).__name__} takes no text alone ({said})") from None


def _has_own_decoder(config: PreTrainedConfig) -> bool:
    """Return True if the configuration refers to code of its own for a causal language model."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _name_kind(config: PreTrainedConfig) -> str:
    return " or ".join(getattr(config, "architectures", None) or [config.model_type])


def require_plain_adapters(model: PreTrainedModel) -> None:
    """Raise ``UnsupportedModelError`` if ``describe_unfit_adapter`` rules out a PEFT adapter, active or not."""
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        invocation = getattr(config, "alora_invocation_tokens", None)
        unfit = describe_unfit_adapter(kind, invocation, learns_prompt=getattr(config, "is_prompt_learning", False))
        if unfit:
            raise UnsupportedModelError(f"{type(model).__name__} has {unfit}")


def describe_unfit_adapter(kind: str, invocation: object, *, learns_prompt: bool) -> str:
    """Return why a PEFT adapter of type ``kind`` cannot be used; "" for one that changes layers, whatever the text.

    ``invocation`` are the tokens from which on an activated LoRA has an effect, if any.
    """
    why = _PROMPT_LEARNING if learns_prompt else _BY_TEXT if invocation or kind == "XLORA" else ""
    name = "alora_invocation_tokens" if invocation and not learns_prompt else kind
    return f"a PEFT adapter {why.format(name)}; accepted are adapters of the layers, such as LoRA" if why else ""


def require_reuse_off_prefix(model: PreTrainedModel, config: PreTrainedConfig, mode: str) -> None:
    """Raise ``UnsupportedModelError`` if layer types or attention rule out ``mode``, which moves stored KV."""
    name = type(model).__name__
    found = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if found:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(found)}, which keep more than KV per token (a state of all tokens, "
            f"an index of them) and cannot be moved, and mode {mode!r} moves all layers or none; {INSTEAD}"
        )
    attention, accepted = config._attn_implementation, " or ".join(map(repr, sorted(_ATTENTION)))
    if attention not in _ATTENTION:
        raise UnsupportedModelError(f"{name} has attn_implementation {attention!r}; mode {mode!r} accepts {accepted}")


def find_cache_argument(model_class: type[PreTrainedModel]) -> str:
    """Return the argument of ``forward`` that takes the KV cache; raise ``UnsupportedModelError`` if there is none."""
    kinds = {name: str(given.annotation) for name, given in inspect.signature(model_class.forward).parameters.items()}
    renamed = Version(transformers.__version__).release >= _RENAMED_IN.release
    for name in _CACHE_ARGUMENTS:  # an argument ``cache`` of XLM is a dictionary of something else
        if name in kinds and (name != "cache" or "Cache" in kinds[name] or (renamed and "dict" not in kinds[name])):
            return name
    raise UnsupportedModelError(f"{model_class.__name__} takes no KV cache: none of {', '.join(_CACHE_ARGUMENTS)}")


def list_handed_on(model: PreTrainedModel) -> frozenset[str]:
    """Return what ``forward`` takes among its ``**kwargs`` and, as far as signatures tell, hands to the decoder."""
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(model).forward).parameters.values())
    decoder = model.get_decoder() if takes_any else None
    taken = inspect.signature(type(decoder).forward).parameters if decoder is not None else ()
    return frozenset({"position_ids"} & set(taken))


def list_left_out(model: PreTrainedModel) -> frozenset[str]:
    """Return what ``generate`` leaves out of each pass, because the model counts positions in its own way (Kosmos)."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=find_input_device(model))
    given = {
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.ones_like(ids).cumsum(1) - 1,
        "is_first_iteration": True,
    }
    try:
        prepared = model.prepare_inputs_for_generation(ids, use_cache=True, **given)
    except (TypeError, AttributeError, ValueError, RuntimeError, LookupError):  # it needs more than text
        return frozenset()
    return frozenset({"position_ids"} - prepared.keys())


def make_cache(layers: Iterable[LayerKV]) -> DynamicCache:
    """Return a new cache that holds these very tensors, not copies. Its updates make new tensors and write to none."""
    cache = DynamicCache()
    cache.layers = [fill_layer(DynamicLayer(), layer) for layer in layers]
    return cache


def fill_layer(layer: DynamicLayer, kv: LayerKV) -> DynamicLayer:
    """Set the keys and values of ``layer`` to the tensors of ``kv``, not copied, and return ``layer``."""
    layer.lazy_initialization(*kv)
    layer.keys, layer.values = kv
    return layer


@contextmanager
def shrink_windows(model: PreTrainedModel, size: int) -> Iterator[None]:
    """Inside, let the model attend to windows and chunks of ``size`` tokens, and choose as many, where it is more.

    So a few tokens tell what lies beyond them. The caller keeps other threads from running the model.
    """
    owners = (model.config, model.config.get_text_config(decoder=True), *model.modules())
    found = [(owner, name) for owner in owners for name in (*_WINDOWS, CHOSEN) if name in vars(owner)]
    before = [(owner, name, vars(owner)[name]) for owner, name in found]
    try:
        for owner, name, width in before:
            if is_whole(width, size):
                setattr(owner, name, size)
        yield
    finally:
        for owner, name, width in before:
            setattr(owner, name, width)


def find_input_device(model: PreTrainedModel) -> torch.device:
    """Return the device to put token ids on; raise ``UnsupportedModelError`` if the embeddings are on 'meta'."""
    module = model.get_input_embeddings()
    hook = find_offload_hook(module)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    found = _find_own_tensor(module).device
    if found.type == "meta":
        raise UnsupportedModelError(f"{type(model).__name__} has no weights: they are on device 'meta'")
    return found


def _find_own_tensor(module: nn.Module) -> Tensor:
    """Return a parameter or buffer of ``module`` itself; ``weight``, which may have to be unpacked, if it has none."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            return tensor
    return cast(Tensor, module.weight)


def has_plain_embeddings(model: PreTrainedModel) -> bool:
    """Return True if the input embeddings are a tensor in memory: not packed, quantized, adapted or offloaded."""
    module = model.get_input_embeddings()
    weight = module._parameters.get("weight")
    return not (find_offload_hook(module) or weight is None or is_packed(weight) or is_wrapped(weight))


def read_embeddings(model: PreTrainedModel) -> Tensor:
    """Return the input embeddings [V, hidden], detached, dequantized if need be; read from disk if offloaded there."""
    module = model.get_input_embeddings()
    hook = find_offload_hook(module)
    found = module._parameters.get("weight") if hook is None else hook.weights_map["weight"]
    if found is None or is_packed(found):  # the module itself knows how to unpack
        size = model.config.get_text_config(decoder=True).vocab_size
        with torch.inference_mode():
            return cast(Tensor, module(torch.arange(size, device=find_input_device(model)))).clone()
    return cast(Tensor, found.dequantize()) if is_wrapped(found) else found.detach()


def find_offload_hook(module: nn.Module) -> Any:
    """Return accelerate's hook that brings in the module's weights for every pass, or None if it keeps them itself."""
    hook = vars(module).get("_hf_hook")
    for one in (hook, *getattr(hook, "hooks", ())):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            return one
    return None
