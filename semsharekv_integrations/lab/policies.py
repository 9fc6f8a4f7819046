"""Policies: which settings are measured under which name, and the model that they are measured on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from semsharekv_integrations.config import EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.errors import require
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel

FULL, EXACT, RETAINED = "off", "exact", "retained"
CHUNKS, ORDER = FLOORS = ("chunks", "order")  # what differs from a full prefill though nothing is approximate
UNBOUNDED = StoreConfig(max_bytes=2**62)
_PACKED = replace(UNBOUNDED, kv_bits=8)
_RETAINING = ReuseConfig(mode="semantic", retention_ratio=0.58)  # the paper's 42% less memory


class Policy(NamedTuple):
    """One line on what it does and where that comes from, and its settings."""

    about: str
    reuse: ReuseConfig
    store: StoreConfig = UNBOUNDED


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        FULL: Policy("A full prefill.", ReuseConfig(mode="off")),
        "rerun": Policy("A second full prefill: what differs from the first one is noise.", ReuseConfig(mode="off")),
        EXACT: Policy("The longest exact prefix, as every serving engine reuses it.", ReuseConfig(mode="exact")),
        "identical": Policy("This package's mode of that name, with its budget of 0.3.", ReuseConfig(mode="identical")),
        "semantic": Policy("This package's mode of that name.", ReuseConfig(mode="semantic")),
        RETAINED: Policy("As semantic, with 42% less KV kept for decoding.", _RETAINING),
        "packed": Policy("As identical, over KV stored in 8 bits.", ReuseConfig(mode="identical"), _PACKED),
        "paper": Policy("SemShareKV as far as it is known (arXiv 2509.24832).", ReuseConfig(mode="paper")),
        CHUNKS: Policy("A floor: a full prefill of the same prompt in two chunks.", ReuseConfig(mode="exact")),
        ORDER: Policy("A floor: a full prefill of the same documents in the stored order.", ReuseConfig(mode="off")),
    }
)
BUDGETS: Mapping[str, Policy] = MappingProxyType(
    {
        f"identical-{budget}": Policy(f"As identical, with {budget}.", ReuseConfig(mode="identical", budget=budget))
        for budget in (0.15, 0.5)
    }
)
SETTINGS = tuple(field.name for field in fields(ReuseConfig) if field.name != "mode")


def make_configs(
    names: Iterable[str], settings: Mapping[str, Any] | None = None, policies: Mapping[str, Policy] = POLICIES
) -> dict[str, EngineConfig]:
    """Engine settings by policy, over a store without bounds. ``settings`` are for those that reuse off the prefix."""
    names, settings = list(names), dict(settings or {})
    for field, values, known in (("policies", names, policies), ("settings", settings, SETTINGS)):
        unknown = sorted(set(values) - set(known))
        require(not unknown, field, ", ".join(unknown), ", ".join(known))
    configs = {}
    for name in names:
        reuse = policies[name].reuse
        reuse = replace(reuse, **settings) if reuse.is_approximate else reuse
        configs[name] = EngineConfig(reuse=reuse, store=policies[name].store)
    return configs


@dataclass(frozen=True)
class Subject:
    """What is measured on."""

    name: str  # a path or hub id
    model: PreTrainedModel  # with its weights, in evaluation mode
    tokenizer: Tokenizer
    note: str = ""  # what a reader of the figures must know of it, perhaps nothing


def load_subject(name: str | None, device: str | None, dtype: str) -> Subject:
    """The model in a folder or of a hub id, by default the built-in one; without ``device`` CUDA if there is one."""
    source = NamedModel(name or REFERENCE_MODEL, device, dtype, {})
    return Subject(source.name, source.load(), source.tokenizer)
