"""Policies: what is measured under which name, methods of the field in this engine, and ablations that damage KV.

A method of the field is its rule for what is computed again, on the runs that this engine finds, re-rotated as this
engine does it; none of them is the authors' own code. An ablation follows the same plan as the policy beside it, over
KV that says nothing. What it still gets right, the tokens computed in the call got right by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from semsharekv_integrations.checks import require
from semsharekv_integrations.config import EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.kv import LayerKV, Reference

Corrupt = Callable[[Reference], Reference]

FULL = "off"
UNGUARDED = 1e9  # a ``max_deviation`` that no KV exceeds, so that no full prefill answers in its place
RAW = ReuseConfig(
    mode="identical",
    boundary_tokens=0,
    edit_tokens=0,
    relevance_ratio=0.0,
    attention_ratio=0.0,
    max_deviation=UNGUARDED,
    max_compute_ratio=1.0,
)


class Policy(NamedTuple):
    """One line on what it does and where that comes from, and its settings."""

    about: str
    reuse: ReuseConfig
    store: StoreConfig = StoreConfig()


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        FULL: Policy("A full prefill.", ReuseConfig(mode="off")),
        "rerun": Policy("A second full prefill: what differs from the first one is noise.", ReuseConfig(mode="off")),
        "exact": Policy("The longest exact prefix, as every serving engine reuses it.", ReuseConfig(mode="exact")),
        "identical": Policy("This package's mode of that name.", ReuseConfig(mode="identical")),
        "semantic": Policy("This package's mode of that name.", ReuseConfig(mode="semantic")),
        "packed": Policy(
            "As identical, over KV that is stored in 8 bits.", ReuseConfig(mode="identical"), StoreConfig(kv_bits=8)
        ),
        "paper": Policy("SemShareKV as far as it is known (arXiv 2509.24832).", ReuseConfig(mode="paper")),
        "raw": Policy(
            "Identical runs with nothing computed again, as Prompt Cache reuses its modules (arXiv 2311.04934).", RAW
        ),
        "cacheblend": Policy(
            "The first layer in full, then the 15% of the tokens that deviate most (CacheBlend, arXiv 2405.16444).",
            replace(RAW, full_layers=1, deviation_ratio=0.15, final_share=1.0),
        ),
        "epic": Policy(
            "The first 16 tokens of each run, where 16 to 32 is the method's range (EPIC, arXiv 2410.15332).",
            replace(RAW, boundary_tokens=16, edit_tokens=16),
        ),
        "zeroed": Policy(
            "As identical, over stored KV of zeros (ablation of SemShareKV).",
            ReuseConfig(mode="identical", max_deviation=UNGUARDED),
        ),
        "random": Policy(
            "As identical, over stored KV of noise with the mean and spread of the real one (ablation of SemShareKV).",
            ReuseConfig(mode="identical", max_deviation=UNGUARDED),
        ),
    }
)
SETTINGS = tuple(field.name for field in fields(ReuseConfig) if field.name != "mode")


def make_configs(names: Iterable[str], settings: Mapping[str, Any] | None = None) -> dict[str, EngineConfig]:
    """Engine settings by policy.

    Args:
        names: of ``POLICIES``.
        settings: fields of ``ReuseConfig`` for every policy that reuses KV off the prefix.

    Raises:
        ValueError: for a name or setting that there is not, or what ``ReuseConfig`` refuses.
    """
    names = list(names)
    _require_known("policies", names, POLICIES)
    configs = with_settings({name: POLICIES[name].reuse for name in names}, settings)
    return {name: replace(config, store=POLICIES[name].store) for name, config in configs.items()}


def with_settings(policies: Mapping[str, ReuseConfig], settings: Mapping[str, Any] | None) -> dict[str, EngineConfig]:
    """Engine settings by policy; for ``settings`` and errors see ``make_configs``."""
    settings = dict(settings or {})
    _require_known("settings", settings, SETTINGS)
    return {
        name: EngineConfig(reuse=replace(reuse, **settings) if reuse.is_approximate else reuse)
        for name, reuse in policies.items()
    }


def _require_known(name: str, values: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(values) - set(known))
    require(not unknown, name, ", ".join(unknown), ", ".join(known))


def make_corruptions(names: Iterable[str], seed: int) -> dict[str, Corrupt]:
    """The ablations among ``names``, with what each does to a stored reference."""
    rng = torch.Generator().manual_seed(seed)
    ablations: dict[str, Corrupt] = {"zeroed": zeroed, "random": partial(noised, rng=rng)}
    return {name: ablations[name] for name in names if name in ablations}


def zeroed(reference: Reference) -> Reference:
    """With keys and values of zero."""
    layers = tuple(LayerKV(torch.zeros_like(keys), torch.zeros_like(values)) for keys, values in reference.layers)
    return replace(reference, layers=layers)


def noised(reference: Reference, rng: torch.Generator) -> Reference:
    """With normally distributed keys and values that have the mean and standard deviation of each layer's own.

    Args:
        reference: of any device and dtype.
        rng: on the CPU, so that a seed means the same on every device.
    """
    layers = tuple(LayerKV(_noise_like(keys, rng), _noise_like(values, rng)) for keys, values in reference.layers)
    return replace(reference, layers=layers)


def _noise_like(tensor: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=rng).to(tensor.device)  # [B, H, S, D]
    return (noise * tensor.float().std() + tensor.float().mean()).to(tensor.dtype)
