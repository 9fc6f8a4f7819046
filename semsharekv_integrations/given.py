"""Checks of what callers give to methods of the engine beside the options of a call: see ``request``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from semsharekv_integrations.checks import check_lifetime, is_path, require
from semsharekv_integrations.config import EngineConfig
from semsharekv_integrations.model.prompt import Prompt
from semsharekv_integrations.request import DOCUMENTS, checked_name_or_none


def checked_config(config: object) -> EngineConfig:
    """The settings, or the usual ones."""
    require(config is None or isinstance(config, EngineConfig), "config", config, "an EngineConfig or None")
    return cast(EngineConfig, config) if config is not None else EngineConfig()


def checked_path(path: object) -> Path:
    """The path of a file."""
    require(is_path(path), "path", path, "the path of a file")
    return Path(cast(Any, path))


def checked_prompts(prompts: object) -> Iterable[Prompt]:
    """Several prompts; what each of them is has to be checked when it is its turn."""
    several = isinstance(prompts, Iterable) and not isinstance(prompts, (str, bytes, Mapping))
    require(several, "prompts", prompts, "a list of prompts, each text or a sequence of messages")
    return cast(Iterable[Prompt], prompts)


def checked_scope(namespace: object, session: object) -> tuple[str | None, str | None]:
    """Names or None; a session has a namespace."""
    require(session is None or namespace is not None, "namespace", namespace, "a string where a session is given")
    return checked_name_or_none("namespace", namespace), checked_name_or_none("session", session)


def check_warming(documents: object, pinned: object, ttl_s: object, progress: object) -> None:
    """Raise ``ValueError`` unless there are documents, and the rest is of its type; the texts are not looked at."""
    require(documents is not None, "documents", documents, DOCUMENTS)
    check_lifetime("ttl_s", ttl_s)
    for name, value in (("pinned", pinned), ("progress", progress)):
        require(isinstance(value, bool), name, value, "True or False")
