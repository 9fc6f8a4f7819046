"""Where a model comes from: configuration, tokenizer and weights, by name or as given objects.

Each is read when first asked for, weights last. A GGUF file can be converted to a folder, so it is dequantized once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import is_accelerate_available, is_gguf_available, is_peft_available
from transformers.utils.logging import disable_progress_bar, set_verbosity_error, tqdm

from semsharekv_integrations.errors import ModelLoadError, SemShareError, UnsupportedModelError, require
from semsharekv_integrations.model.files import (
    FILE_OPTIONS,
    LOADING,
    REFERENCE_MODEL,
    ModelFiles,
    read_gguf_once,
    resolve,
    shorten_reason,
)
from semsharekv_integrations.model.layers import choose_auto_class, describe_unfit_adapter, is_multimodal
from semsharekv_integrations.versions import require_tested_transformers

__all__ = ["REFERENCE_MODEL", "GivenModel", "ModelSource", "NamedModel", "get_window", "hide_progress_bars", "resolve"]
_APART = {"adapter_kwargs", "output_loading_info", "quantization_config", "torch_dtype"}
_SECRETS = {"token"}


class GivenModel:
    """A model and a tokenizer in memory; ``ValueError`` for anything else, or an error for an untested transformers."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        require_tested_transformers()
        is_model = isinstance(model, torch.nn.Module) and hasattr(model, "config")
        require(is_model, "model", type(model).__name__, "a loaded transformers model; from_pretrained takes names")
        is_tokenizer = isinstance(tokenizer, PreTrainedTokenizerBase)
        require(is_tokenizer, "tokenizer", type(tokenizer).__name__, "a transformers tokenizer, such as a processor's")
        self._model = model
        self.config: PreTrainedConfig = model.config
        self.tokenizer = tokenizer

    def load(self) -> PreTrainedModel:
        """Return the given model itself, set to eval mode."""
        return self._model.eval()


class NamedModel:
    """A local folder, a GGUF file, a hub id, or ``semsharekv/reference``; the folder may be that of a PEFT adapter.

    Args:
        device: where the model goes, or None for CUDA if there is one, else the CPU. Leave it None with ``device_map``.
        dtype: ``auto`` for the dtype that the model's configuration names, else a torch dtype or its name.
        options: for ``AutoModelForCausalLM.from_pretrained``; what says where files are or how to read them, such as
            ``cache_dir``, ``subfolder``, ``gguf_file`` or ``revision``, goes to configuration and tokenizer too.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
        UnsupportedVersionError: if transformers has a version that was not tested.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        device: str | torch.device | None,
        dtype: str | torch.dtype,
        options: Mapping[str, Any],
    ) -> None:
        require_tested_transformers()
        accepted = "a folder, a .gguf file, a hub id or 'semsharekv/reference'"
        require(isinstance(name, (str, os.PathLike)) and bool(os.fspath(name)), "name_or_path", name, accepted)
        require(device is None or "device_map" not in options, "device", device, "None beside device_map")
        older = options.get("torch_dtype", dtype)
        require(dtype == "auto" or _is_same(older, dtype), "torch_dtype", older, f"{dtype!r} or nothing beside dtype")
        self.name = os.fspath(name)
        self._device = None if device is None else _parse_device(device)
        self._dtype = _parse_dtype(older)
        self._files = ModelFiles(self.name, options)
        self._options = {key: value for key, value in options.items() if key not in FILE_OPTIONS | _APART}
        self._quantized = {key: value for key, value in options.items() if key == "quantization_config"}
        self._adapter_options = options.get("adapter_kwargs") or {}
        self._shown = sorted((key, repr(value)) for key, value in options.items() if key not in _SECRETS)

    @cached_property
    def origin(self) -> str:
        """Return a digest of name, device, dtype and options but token, and of local files' names, sizes and dates."""
        told: list[Any] = [self.name, str(self._device), str(self._dtype).removeprefix("torch."), self._shown]
        place = Path(resolve(self.name))
        found = sorted(place.rglob("*")) if place.is_dir() else [place] if place.is_file() else []
        told += [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()]
        return hashlib.blake2b(repr(told).encode(errors="replace"), digest_size=16).hexdigest()

    @property
    def config(self) -> PreTrainedConfig:
        """Return the configuration, of an adapter its base's; raise ``ModelLoadError`` or ``UnsupportedModelError``."""
        return self._config_and_rest[0]

    @cached_property
    def _config_and_rest(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """Return the configuration, changed by options that name its fields, and other options; raise if no decoder."""
        files, base = self._files, self._files.base
        if files is not base:
            _require_peft(files)
        base.require_model()
        options = self._options | base.options
        with _explain_failure(base, "its configuration cannot be read"):
            config, rest = AutoConfig.from_pretrained(base.path, return_unused_kwargs=True, **options)
        choose_auto_class(config, f"model {self.name!r}")
        return config, {key: value for key, value in rest.items() if key in self._options}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read and return the tokenizer, the base's if an adapter brings none; ``ModelLoadError`` if that fails."""
        config = self.config
        files = self._files if self._files.has_tokenizer else self._files.base
        if files.is_local and not files.has_tokenizer:
            raise files.explain("there is no tokenizer in its folder: no tokenizer.json, tokenizer.model or the like")
        options = files.options if files is self._files.base else files.options | {"config": config}
        with _explain_failure(files, "its tokenizer cannot be read"):
            tokenizer = AutoTokenizer.from_pretrained(files.path, **options)
            if not tokenizer.get_vocab():
                raise ValueError("it has no vocabulary")
        if tokenizer.chat_template is None and is_multimodal(config):
            tokenizer.chat_template = files.read_processor_template()
        return tokenizer

    def load(self) -> PreTrainedModel:
        """Read weights (and adapter), place the model, return it in eval mode; ``ModelLoadError`` if that fails."""
        assert self.origin, "told before the files are read"
        config, rest = self._config_and_rest  # says what is wrong with the files before anything takes long
        files, base = self._files, self._files.base
        if self._device is not None and not _is_here(self._device):
            raise files.explain(f"device is {str(self._device)!r}; accepted is None or {_name_devices()}")
        quantized = ({"quantization_config": GgufConfig(dequantize=True)} if base.is_gguf else {}) | self._quantized
        own = {"config": config, "dtype": self._dtype, "adapter_kwargs": base.where, "output_loading_info": True}
        reading = read_gguf_once() if base.is_gguf else nullcontext()
        with _explain_failure(base, "its weights cannot be read"), LOADING, reading:
            auto_class = choose_auto_class(config, f"model {self.name!r}")
            model, found = auto_class.from_pretrained(base.path, **rest, **base.options, **own, **quantized)
            _require_whole(found["missing_keys"])
            _make_ordinary(model)
        if "device_map" not in self._options:
            with _explain_failure(base, f"it cannot be put on {self._device or 'its device'}"):
                model = model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if files is not base:
            with _explain_failure(files, "the adapter's weights cannot be read"), LOADING:
                options = files.where | self._adapter_options
                added = model.load_adapter(files.path, adapter_kwargs=options, dtype=model.dtype)
                _require_whole(_read_by_peft(model, files, added.missing_keys))
        return model.eval()


# A model that may not be in memory yet. Reading ``config`` and ``tokenizer`` loads no weights; these two and ``load``,
# which is called once, may raise ``ModelLoadError`` or ``UnsupportedModelError``.
ModelSource = GivenModel | NamedModel


def merge_arguments(device: Any, dtype: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with device and dtype added, as keyword arguments of ``SemShareEngine.from_pretrained``.

    ``ValueError`` if one is set here and differs in ``options``, or if an option names the model or its configuration.
    """
    for name in ("config", "name_or_path", "pretrained_model_name_or_path"):
        require(name not in options, f"model_kwargs[{name!r}]", options.get(name), "nothing: it has a field of its own")
    arguments = {"device": device, "dtype": dtype, **options}
    for name, field, usual in (("device", device, None), ("dtype", dtype, "auto")):
        if field != usual:
            found = arguments[name]
            require(_is_same(found, field), f"model_kwargs[{name!r}]", found, f"{field!r} or nothing")
    return arguments


def is_local(name: str, options: Mapping[str, Any]) -> bool:
    """Return True if model and base are local folders, or the folder is already known to be bad; asks no hub."""
    files = ModelFiles(name, options)
    try:
        return files.is_local and files.base.is_local
    except ModelLoadError:
        return True


def get_window(config: PreTrainedConfig) -> int | None:
    """Return how many positions the model was made for, or None if its configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def hide_progress_bars() -> None:
    """Turn off transformers' progress bars, and its logs below errors, in the whole process and for good."""
    disable_progress_bar()
    set_verbosity_error()
    modeling_gguf_pytorch_utils.tqdm = tqdm  # one that can be turned off, in place of one that cannot


def convert(path: Path, folder: Path) -> None:
    """Write the GGUF file ``path`` in bfloat16 as ``folder``, whole or not at all, private; an old folder stays.

    ``OSError`` if the folder cannot be written, ``ModelLoadError`` if the file is no model that transformers can read.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix="part-", dir=folder.parent))
    try:
        source = NamedModel(str(path), "cpu", torch.bfloat16, {})
        with read_gguf_once():
            source.load().save_pretrained(part)
            source.tokenizer.save_pretrained(part)
            if not folder.exists():
                part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _explain_failure(files: ModelFiles, what: str) -> Iterator[None]:
    """Inside, turn any exception but this package's own into a ``ModelLoadError`` of one line that names the model."""
    try:
        yield
    except SemShareError:
        raise
    except Exception as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is not None and isinstance(error, TypeError):
            what, error = "options", ValueError(f"{unknown[1]} is none that loading knows")
        reason = f"{what}: {shorten_reason(error)}"
        readers = {"gguf": is_gguf_available, "accelerate": is_accelerate_available}
        lacking = [name for name, is_there in readers.items() if files.is_gguf and not is_there()]
        if lacking:
            reason = f"reading a GGUF file needs {' and '.join(lacking)}: pip install {' '.join(lacking)}"
        raise files.explain(reason) from None


def _require_whole(missing: Collection[str]) -> None:
    """Raise ``ValueError`` if any weights are ``missing`` from the files, for which transformers puts random ones."""
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{len(missing)} of them are in no file: {names}{', ...' if len(missing) > 3 else ''}")


def _read_by_peft(model: PreTrainedModel, files: ModelFiles, missing: Collection[str]) -> set[str]:
    """Read the adapter's files by peft itself if transformers left any ``missing``; return those that still are.

    transformers does not find DoRA's magnitudes, which peft saves under another name than they have in the model.
    """
    if not missing:
        return set()
    import peft

    weights = peft.load_peft_weights(files.path, device=str(model.device), **files.where)
    found: Any = peft.set_peft_model_state_dict(model, weights)
    return set(missing) & set(found.missing_keys)


def _require_peft(files: ModelFiles) -> None:
    """Raise ``ModelLoadError`` without the package peft, ``UnsupportedModelError`` for an unfit adapter."""
    assert files.adapter is not None
    if not is_peft_available():
        raise files.explain("it is a PEFT adapter; loading it needs the package peft: pip install peft")
    import peft

    kind = str(files.adapter.get("peft_type"))
    configs: Mapping[Any, type] = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    learns_prompt = issubclass(configs.get(kind, object), peft.PromptLearningConfig)
    invocation = files.adapter.get("alora_invocation_tokens")
    unfit = describe_unfit_adapter(kind, invocation, learns_prompt=learns_prompt)
    if unfit:
        raise UnsupportedModelError(f"model {files.name!r} is {unfit}")


def _make_ordinary(model: PreTrainedModel) -> None:
    """Remove from a model of dequantized GGUF weights the marks of quantization, so it can be saved and moved."""
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, GgufConfig) and config.dequantize:
        for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            vars(config).pop("quantization_config", None)
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(name, None)


def _is_same(one: Any, other: Any) -> bool:
    """Return True if two devices or dtypes have the same name, with or without ``torch.``."""
    return str(one).removeprefix("torch.") == str(other).removeprefix("torch.")


def _parse_device(device: str | torch.device) -> torch.device:
    """Return the device; ``ValueError`` if torch knows none such, or 'meta'. This machine need not have it."""
    found = torch.device("meta")
    with suppress(RuntimeError, TypeError):
        found = torch.device(device)
    require(found.type != "meta", "device", device, f"None or {_name_devices()}")
    return found


def _is_here(device: torch.device) -> bool:
    """Return True if this machine has ``device``."""
    try:
        kind = torch.get_device_module(device.type)
    except RuntimeError:
        return False
    return kind.is_available() and (device.index or 0) < kind.device_count()


def _name_devices() -> str:
    """Return the devices of this machine, as text for an error."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "'cpu'; PyTorch finds no other device here"
    names = [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    return " or ".join(map(repr, ("cpu", accelerator.type, *names)))


def _parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return 'auto' or the torch dtype; ``ValueError`` if it is no dtype of floating point."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    fits = dtype == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point)
    require(fits, "dtype", dtype, "'auto' or a torch dtype such as 'bfloat16'")
    return "auto" if dtype == "auto" or found is None else found
