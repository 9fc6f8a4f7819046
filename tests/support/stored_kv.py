"""A small directory of stored KV, and what is in it, for the tests of the disk tier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semsharekv_integrations.store.directory import KVDirectory
from semsharekv_integrations.store.records import EntryRecord, NodeRecord

FINGERPRINT = "ab12"
Records = dict[str, tuple[Any, ...]]


def tensors(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    made = torch.randint(-128, 128, (2, 1, 3, num_tokens, 5), generator=torch.Generator().manual_seed(seed))
    return {"0.keys": made[0].to(dtype), "0.values": made[1].to(dtype)}


def node(id: str, parent: str | None, token_ids: Sequence[int], file: str, first: int = 0, **other: Any) -> NodeRecord:
    return NodeRecord(id, parent, other.get("namespace", "a"), np.array(token_ids, dtype=np.int64), file, first)


def entry(id: str, node: str, hits: float = 0.0, **other: Any) -> EntryRecord:
    labels = {"segments": [["d", 1, 3]], "session": None, "document_starts": {"é": 1}, "pinned": False}
    labels["expires_after_s"] = None
    return EntryRecord(id, other.get("namespace", "a"), node, labels, hits, 1e9)


def fill(directory: KVDirectory) -> None:
    """Two prompts with a common start in one namespace, one in another; the first two nodes share a file."""
    shared, rest, lone = (directory.files.write(tensors(n, seed=n), n) for n in (6, 4, 3))
    nodes = [node("r", None, [1, 2, 3], shared), node("s", "r", [4, 5, 6], shared, 3), node("t", "r", [7] * 4, rest)]
    nodes.append(node("u", None, [1, 2, 8], lone, namespace="b"))
    entries = [entry("es", "s", 2.5), entry("et", "t"), entry("eu", "u", namespace="b")]
    directory.record(nodes=nodes, entries=entries)


def records(directory: KVDirectory) -> Records:
    """All nodes and entries by kind and id, comparable by ``==``."""
    found = directory.contents()
    nodes = {f"node {n.id}": (*n[:3], tuple(n.token_ids.tolist()), *n[4:]) for n in found.nodes}
    return nodes | {f"entry {e.id}": (*e[:3], str(dict(e.labels)), *e[4:]) for e in found.entries}


def kv_files(path: Path) -> set[str]:
    """Ids of the KV files in a model's directory; nothing else but the catalog and the lock may be there."""
    names = {item.name for item in path.iterdir()}
    found = {name for name in names if name.endswith(".safetensors")}
    ours = {"lock", "catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "catalog.damaged"}
    assert names - found <= ours, names - found - ours
    return {name.removesuffix(".safetensors") for name in found}
