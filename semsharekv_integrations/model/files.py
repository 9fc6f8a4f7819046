"""Finds a model's files in a folder, a GGUF file or on the hub, and says in one line what is missing; no weights."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id  # type: ignore[attr-defined]
from transformers.utils import cached_file

from semsharekv_integrations.concurrency.threads import free_in_children
from semsharekv_integrations.errors import ModelLoadError, is_whole, require, show_value

REFERENCE_MODEL = "semsharekv/reference"
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_HOW = ("code_revision", "gguf_file", "trust_remote_code")
FILE_OPTIONS = frozenset((*_WHERE, *_HOW))
_CONFIG, _GENERATION, _ADAPTER, _GGUF = "config.json", "generation_config.json", "adapter_config.json", ".gguf"
_TEMPLATES = ("chat_template.json", "processor_config.json")  # of a processor; a tokenizer reads neither
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "spm.model", "merges.txt"),
)
_GGUF_MAGIC = b"GGUF"
_MISSING = ("gated_repo", "missing_entries", "connection_errors")  # what ``cached_file`` may return None for
# Held while weights are read: transformers replaces functions of torch then, and ``read_gguf_once`` those of gguf
LOADING = free_in_children(threading.RLock())
_this_thread = threading.local()
_ASKED_WITHIN_S = 10.0
_MOST_REASON_CHARS = 300  # of another library's error


def resolve(name_or_path: str | os.PathLike[str]) -> str:
    """Return the packaged folder for ``semsharekv/reference``, a path with ``~`` expanded, or the name unchanged."""
    name = os.fspath(name_or_path)
    if name == REFERENCE_MODEL:
        return str(files("semsharekv_integrations") / "assets" / "reference")
    return os.path.expanduser(name) if name.startswith("~") else name


class ModelFiles:
    """The files of one model: a folder, a GGUF file, a hub id, or ``semsharekv/reference``.

    Keeps those of ``options`` that say where files are or how to read them, and looks at no file but a GGUF's. Errors
    call the model by its ``role``. Members may raise ``ModelLoadError``; a wrong ``gguf_file`` raises ``ValueError``.
    """

    def __init__(self, name: str, options: Mapping[str, Any], role: str = "model") -> None:
        self.name = name
        self._role = role
        self._given = {key: options[key] for key in FILE_OPTIONS if options.get(key) is not None}
        path = resolve(name)
        if path.endswith(_GGUF) and os.path.isfile(path):
            given = self._given.get("gguf_file", os.path.basename(path))
            require(given == os.path.basename(path), "gguf_file", given, f"nothing beside {name!r}")
            self._given["gguf_file"] = os.path.basename(path)
            path = os.path.dirname(path) or os.curdir
        self.path = path
        self.is_gguf = "gguf_file" in self._given  # all of them are in one file

    @property
    def is_local(self) -> bool:
        """Return True if the path is an existing folder; no hub is asked then."""
        return os.path.isdir(self.path)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Return options for every ``from_pretrained``: those given, and local_files_only if one try finds no hub."""
        asked = not (self.is_local or self._given.get("local_files_only") or constants.HF_HUB_OFFLINE)
        return self._given | ({"local_files_only": True} if asked and not _can_reach_hub() else {})

    @property
    def where(self) -> dict[str, Any]:
        """Return those of ``options`` that say where files are."""
        return {key: value for key, value in self.options.items() if key in _WHERE}

    def explain(self, reason: object) -> ModelLoadError:
        """Return, not raise, an error that says in one line why the model could not be loaded."""
        return ModelLoadError(f"{self._role} {self.name!r} could not be loaded: {shorten_reason(reason)}")

    def require_place(self) -> None:
        """Raise unless the path is a folder (with its subfolder) or in form a hub id; does not ask the hub."""
        if self.is_local:
            if not self._folder.is_dir():
                raise self.explain(f"there is no folder {self._given['subfolder']!r} (subfolder) in its folder")
            return
        if os.path.exists(self.path):
            raise self.explain(f"it is a file; accepted is a folder, a {_GGUF} file or a hub id")
        if self.path.endswith(_GGUF) or not _can_be_on_hub(self.path):
            raise self.explain("there is no such file or folder")

    def require_model(self) -> None:
        """Raise if a folder, or the cache of a hub out of reach, lacks the model; a hub in reach is not searched."""
        self.require_place()
        gguf = self._given.get("gguf_file")
        if not self.is_local:
            offline = self.options.get("local_files_only", constants.HF_HUB_OFFLINE)
            if offline and self.find(gguf or _CONFIG) is None and self.find(_ADAPTER) is None:
                is_asked = not (self._given.get("local_files_only") or constants.HF_HUB_OFFLINE)
                why = f"and {constants.ENDPOINT} does not answer" if is_asked else "and the hub is not asked"
                raise self.explain(f"there is no such folder, nor such a model in the hub's cache, {why}")
            return
        if gguf is not None:
            if not self._has(gguf):
                raise self.explain(f"there is no file {gguf!r} (gguf_file) in its folder")
            with (self._folder / gguf).open("rb") as file:
                if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
                    raise self.explain(f"{gguf!r} is no GGUF file: it does not begin with {_GGUF_MAGIC.decode()!r}")
        elif not self._has(_CONFIG) and not self._has(_ADAPTER):
            found = sorted(path.name for path in self._folder.glob(f"*{_GGUF}"))
            hint = f"; gguf_file may be {' or '.join(map(repr, found[:4]))}" if found else ""
            raise self.explain(f"there is no model in its folder: neither {_CONFIG} nor {_ADAPTER}{hint}")
        if self._has(_GENERATION):
            self._require_generation()  # transformers does without, and knows no end of answers

    @property
    def has_tokenizer(self) -> bool:
        """Return True if there is a tokenizer file (fetched if need be), or if the model is a GGUF file."""
        return self.is_gguf or any(self.find(name) for name in _TOKENIZER_FILES)

    def read_processor_template(self) -> str | None:
        """Return the chat template that the files of a processor hold; None if they hold none or are missing."""
        for found in filter(None, map(self.find, _TEMPLATES)):
            content = self._read_json(found)
            template = content.get("chat_template") if isinstance(content, dict) else None
            if isinstance(template, str):
                return template
        return None

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """Return the configuration of a lone PEFT adapter; None for a model. Raise if damaged, or no base is named."""
        self.require_place()
        found = self.find(_ADAPTER)
        if found is None or self.is_gguf or (self.is_local and self._has(_CONFIG)):
            return None
        config = self._read_json(found)
        if not isinstance(config, dict) or not isinstance(config.get("base_model_name_or_path"), str):
            raise self.explain(f"its {_ADAPTER} names no base_model_name_or_path")
        return config

    @cached_property
    def base(self) -> ModelFiles:
        """Return the files of the adapter's base model, or ``self`` if this is no adapter; they are not checked."""
        if self.adapter is None:
            return self
        kept = {key: value for key, value in self._given.items() if key not in ("revision", "subfolder")}
        kept["revision"] = self.adapter.get("revision")
        return ModelFiles(self.adapter["base_model_name_or_path"], kept, f"the base of adapter {self.name!r}, model")

    def find(self, filename: str) -> Path | None:
        """Return the file's path, fetched from the hub if need be; None if it is missing or the hub denies it."""
        if self.is_local:
            return self._folder / filename if self._has(filename) else None
        silent = {f"_raise_exceptions_for_{kind}": False for kind in _MISSING}
        try:
            found = cached_file(self.path, filename, **self.where, **silent)
        except OSError as error:
            raise self.explain(error) from None
        return None if found is None else Path(found)

    @property
    def _folder(self) -> Path:
        return Path(self.path, self._given.get("subfolder", ""))

    def _read_json(self, path: Path) -> Any:
        """Return what the JSON file holds; raise ``ModelLoadError`` if it cannot be read or parsed."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.explain(f"its {path.name} is damaged: {error}") from None

    def _require_generation(self) -> None:
        """Raise if generation_config.json is damaged, or its eos_token_id is not null, a token id or a list of them."""
        found = self._read_json(self._folder / _GENERATION)
        if not isinstance(found, dict):
            raise self.explain(f"its {_GENERATION} is damaged: it holds no object")
        ends = found.get("eos_token_id")
        if ends is not None and not all(is_whole(end, -1) for end in (ends if isinstance(ends, list) else [ends])):
            raise self.explain(
                f"its {_GENERATION} has eos_token_id {show_value(ends)}; accepted is null, a token id or a list of them"
            )

    def _has(self, filename: str) -> bool:
        return (self._folder / filename).is_file()


def _can_be_on_hub(name: str) -> bool:
    """Return True if ``name`` has the form of a hub id; asks no hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _can_reach_hub() -> bool:
    """Ask the hub once, for at most ten seconds or so. Return True for any response, False for any error."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_ASKED_WITHIN_S)
    except Exception:  # whatever keeps it from answering; the client's errors depend on its version
        return False
    return True


def shorten_reason(reason: object) -> str:
    """Return ``reason`` in one short line, in our words where its own would mislead.

    An error's class comes first, unless it is an ``OSError`` or ``ValueError`` with a text.
    """
    text = " ".join(str(reason).split())
    if isinstance(reason, UnpicklingError):  # whose text says how to run what the file may hold
        return "a pickle file is damaged or holds more than tensors"
    if "ignore_mismatched_sizes" in text:
        return "some of them have other sizes than the configuration says"
    if isinstance(reason, Exception) and not (text and isinstance(reason, OSError | ValueError)):
        text = f"{type(reason).__name__}: {text}"
    return text if len(text) <= _MOST_REASON_CHARS else f"{text[:_MOST_REASON_CHARS]}..."


@contextmanager
def read_gguf_once() -> Iterator[None]:
    """Inside, cache what transformers asks gguf for: a file's content (three times) and name maps (one per module).

    Holds ``LOADING`` and replaces names of the package gguf meanwhile. A thread that is inside may enter again.
    """
    if getattr(_this_thread, "reads_gguf", False):
        yield
        return
    import gguf

    with LOADING:
        reader, make_map = _get_gguf_functions()

        class Reader(reader):  # type: ignore[misc, valid-type]
            """Slices a plain array, which takes a fifth of the time that slicing a memory map takes."""

            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, np.asarray(value) if name == "data" else value)

        _this_thread.reads_gguf = True
        vars(gguf).update(GGUFReader=cache(Reader), get_tensor_name_map=cache(make_map))
        try:
            yield
        finally:
            vars(gguf).update(GGUFReader=reader, get_tensor_name_map=make_map)
            _this_thread.reads_gguf = False


@cache
def _get_gguf_functions() -> tuple[Any, Any]:
    """Return gguf's own reader and name map. Found once, as a process may be forked while they are replaced."""
    import gguf

    return gguf.GGUFReader, gguf.get_tensor_name_map
