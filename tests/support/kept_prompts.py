"""Stored prompts for the tests of the store: KV that tells where it belongs, and stores with clocks of their own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semsharekv_integrations import StoreConfig
from semsharekv_integrations.kv import LayerKV, Reference, Run
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.records import reference_id

Tokens = tuple[int, ...]
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 1, 3
BYTES_PER_TOKEN = NUM_LAYERS * 2 * NUM_HEADS * HEAD_DIM * 4
MIN_RUN_TOKENS = 2
FINGERPRINT = "ab12"
START_S = 1e9  # of the wall clock
CPU = torch.device("cpu")


class Clock:
    """Seconds, as told; ``wall`` is the same clock, off by something that may jump."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.wall_offset_s = START_S

    def __call__(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return self.now_s + self.wall_offset_s


def layers_of(tokens: Tokens, whose: str, dtype: torch.dtype = torch.float32) -> tuple[LayerKV, ...]:
    """KV that depends, as a model's does, on all tokens up to its own; and on ``whose`` it is. From -1 to 1."""
    seeds, state = [], sum(map(ord, whose))
    for token in tokens:
        state = (state * 31 + token * 7 + 1) % 1000003
        seeds.append(state)
    shape = (1, 1, 1, 1, HEAD_DIM)
    numbers = torch.tensor(seeds)[None, None, None, :, None] * (1 + torch.arange(HEAD_DIM)).view(shape)
    kinds = torch.arange(NUM_LAYERS * 2).view(-1, 1, 1, 1, 1)
    made = ((numbers + kinds * 5) % 17 - 8) / 8  # [2 L, B, H, S, D]
    return tuple(LayerKV(*made[2 * n : 2 * n + 2].to(dtype)) for n in range(NUM_LAYERS))


def reference(tokens: Tokens, namespace: str = "a", dtype: torch.dtype = torch.float32, **labels: Any) -> Reference:
    ids = np.array(tokens, dtype=np.int64)
    layers = layers_of(tokens, namespace, dtype)
    return Reference(reference_id(namespace, ids), namespace, ids, layers, **labels)


def tainted(tokens: Tokens, session: str | None = "s", namespace: str = "a", **labels: Any) -> Reference:
    """With KV that no exact entry has."""
    labels = {"exact_tokens": len(tokens) - 1, **labels}
    ids = np.array(tokens, dtype=np.int64)
    layers = layers_of(tokens, f"{namespace}/{session}")
    return Reference(reference_id(namespace, ids), namespace, ids, layers, session=session, **labels)


def assert_whole(found: Reference, tolerance: float = 0.0) -> None:
    """KV and token ids of what a store delivered belong together, and to its namespace."""
    tokens = tuple(found.token_ids.tolist())
    whose = f"{found.namespace}/{found.session}" if found.is_tainted else found.namespace
    assert len(found.layers) == NUM_LAYERS
    for layer, wanted in zip(found.layers, layers_of(tokens, whose, found.layers[0].keys.dtype), strict=True):
        for tensor, expected in zip(layer, wanted, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=tolerance)


def config_of(
    max_tokens: int = 1000, host_tokens: int = 0, directory: Path | None = None, **settings: Any
) -> StoreConfig:
    bounds = {"max_bytes": max_tokens * BYTES_PER_TOKEN, "host_max_bytes": host_tokens * BYTES_PER_TOKEN}
    return StoreConfig(**{**bounds, "directory": directory, **settings})


def opened(config: StoreConfig, clock: Clock | None = None, dtype: torch.dtype = torch.float32) -> KVStore:
    clock = clock or Clock()
    store = KVStore(config, clock, clock.wall, min_run_tokens=MIN_RUN_TOKENS)
    store.open(FINGERPRINT, dtype, CPU)
    return store


def store_of(max_tokens: int = 1000, **settings: Any) -> tuple[KVStore, Clock]:
    clock = Clock()
    return opened(config_of(max_tokens, **settings), clock), clock


def lookup(store: KVStore, tokens: Tokens, namespace: str = "a", session: str | None = None) -> int:
    """How many tokens are found; what is delivered is compared."""
    ids = np.array(tokens, dtype=np.int64)
    match = store.find_prefix(ids, namespace, max_tokens=len(tokens), session=session)
    if match is None:
        return 0
    assert match.reference.namespace in store.list_readable(namespace)
    assert tuple(match.reference.token_ids[: match.num_tokens]) == tokens[: match.num_tokens]
    assert_whole(match.reference, 0.005 if store.config.kv_bits else 0.0)
    return match.num_tokens


def put_all(store: KVStore, clock: Clock, prompts: Iterable[Tokens], **labels: Any) -> None:
    for tokens in prompts:
        clock.now_s += 1
        assert store.put(reference(tokens, **labels))
        store.check()


def runs_of(store: KVStore, tokens: Tokens, namespace: str = "a") -> list[Run]:
    return store.find_runs(np.array(tokens, dtype=np.int64), namespace, start=0, stop=len(tokens))


def distinct_tokens(prompts: Iterable[Tokens]) -> int:
    """Tokens of prompts whose common beginnings are counted once."""
    return len({tokens[: n + 1] for tokens in prompts for n in range(len(tokens))})
