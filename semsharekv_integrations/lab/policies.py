"""Policies: what is measured under which name, and ablations that damage stored KV.

An ablation follows the same plan as the policy beside it, over KV that says nothing. What it still gets right, the
tokens computed in the call got right by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from semsharekv_integrations.checks import require
from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.kv import LayerKV, Reference
from semsharekv_integrations.modes import Mode

Corrupt = Callable[[Reference], Reference]

FULL = "off"
POLICIES: Mapping[str, Mode] = MappingProxyType(
    {
        FULL: "off",
        "rerun": "off",  # a second full prefill: what differs from the first one is noise
        "exact": "exact",
        "identical": "identical",
        "semantic": "semantic",
        "paper": "paper",
        "zeroed": "identical",
        "random": "identical",
    }
)
ABLATIONS = ("zeroed", "random")
UNGUARDED = 1e9  # so that the guard does not answer damaged KV with a full prefill
SETTINGS = tuple(field.name for field in fields(ReuseConfig) if field.name != "mode")


def make_configs(names: Iterable[str], settings: Mapping[str, Any] | None = None) -> dict[str, EngineConfig]:
    """Engine settings by policy.

    Args:
        names: of ``POLICIES``.
        settings: fields of ``ReuseConfig`` for every policy that reuses KV off the prefix.

    Raises:
        ValueError: for a name or setting that there is not, or what ``ReuseConfig`` refuses.
    """
    names, settings = list(names), dict(settings or {})
    _require_known("policies", names, POLICIES)
    _require_known("settings", settings, SETTINGS)
    plain = {name: ReuseConfig(mode=POLICIES[name]) for name in names}
    for name in plain.keys() & ABLATIONS:
        plain[name] = replace(plain[name], max_deviation=UNGUARDED)
    return {
        name: EngineConfig(reuse=replace(reuse, **settings) if reuse.is_approximate else reuse)
        for name, reuse in plain.items()
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
