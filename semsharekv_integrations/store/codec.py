"""References in one safetensors file: tensors as they are, everything else in its header as JSON, a digest over both.

The digest finds damage, not forgery: whoever can write the file can write the digest too.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from semsharekv_integrations.checks import is_whole
from semsharekv_integrations.errors import StoreFileError, StoreWriteError
from semsharekv_integrations.kv import LayerKV, Reference, Segment, TokenIds
from semsharekv_integrations.store.files import tensor_digest
from semsharekv_integrations.store.labels import reference_id, stops_of
from semsharekv_integrations.store.records import EntryRecord
from semsharekv_integrations.store.soundness import is_sound

FORMAT_VERSION = 2


def write_references(path: Path, references: Sequence[Reference], fingerprint: str) -> int:
    """Write beside ``path``, then rename over it: a reader sees the old file or the new one, never a part.

    A link in its place is replaced; what it leads to stays. All must be exact: approximate KV is never written.

    Raises:
        StoreWriteError: if it cannot be written; what was there stays, and nothing else is left.
    """
    assert not any(reference.is_tainted for reference in references), "approximate KV is never written"
    tensors = {f"{n}.ids": torch.from_numpy(reference.token_ids) for n, reference in enumerate(references)}
    for n, reference in enumerate(references):
        for index, layer in enumerate(reference.layers):
            tensors[f"{n}.{index}.keys"], tensors[f"{n}.{index}.values"] = (t.contiguous().cpu() for t in layer)
    header = json.dumps(
        {"version": FORMAT_VERSION, "fingerprint": fingerprint, "entries": [_header(r) for r in references]}
    )
    metadata = {"semsharekv": header, "digest": tensor_digest(header, sorted(tensors.items()))}
    try:
        _write(path, tensors, metadata)
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreWriteError(f"{path} could not be written: {error}") from error
    return len(references)


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".semsharekv.")  # owner-only permissions
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o600)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_references(path: Path, fingerprint: str, device: torch.device) -> list[Reference]:
    """The references in ``path``, on ``device``.

    Raises:
        StoreFileError: if the file is missing, damaged, of another format version or of another model.
    """
    if path.exists() and not path.is_file():
        raise StoreFileError(f"{path} is not a readable KV file: it is a folder, or no file at all")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata["semsharekv"])
            _require_same(path, "version", header["version"], FORMAT_VERSION)
            _require_same(path, "model fingerprint", header["fingerprint"], fingerprint)
            named = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            _require_same(
                path,
                "digest",
                tensor_digest(metadata["semsharekv"], ((name, tensor.cpu()) for name, tensor in named)),
                metadata["digest"],
            )
            return [_read(file, n, entry) for n, entry in enumerate(header["entries"])]
    except (OSError, RuntimeError, MemoryError) as error:
        raise StoreFileError(f"{path} cannot be read: {error}") from error
    except (SafetensorError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise StoreFileError(f"{path} is not a readable KV file: {error}") from error


def _require_same(path: Path, name: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise StoreFileError(f"{path} has {name} {found!r}; accepted is {wanted!r}")


def _require_sound(n: int, entry: dict[str, Any], token_ids: TokenIds) -> None:
    """Raise ``ValueError`` for values that were never written: a right digest says nothing about them."""
    as_record = EntryRecord(str(n), entry["namespace"], str(n), entry, 0.0, 0.0)
    are_ids = token_ids.ndim == 1 and len(token_ids) > 0 and bool((token_ids >= 0).all())
    if not (are_ids and is_whole(entry["layers"], 1) and is_sound(as_record)):
        raise ValueError(f"entry {n} has values of a wrong kind")
    if any(stop > len(token_ids) for _, _, stop in entry["segments"]):
        raise ValueError(f"entry {n} has segments beyond its tokens")


def _header(reference: Reference) -> dict[str, Any]:
    return {
        "namespace": reference.namespace,
        "layers": len(reference.layers),
        "session": reference.session,
        "document_starts": dict(reference.document_starts),
        "document_stops": dict(reference.document_stops),
        "segments": reference.segments,
        "pinned": reference.pinned,
        "expires_after_s": reference.expires_after_s,
        "rounded": reference.rounded,
    }


def _read(file: Any, n: int, entry: dict[str, Any]) -> Reference:
    token_ids = file.get_tensor(f"{n}.ids").cpu().numpy().astype(np.int64)
    _require_sound(n, entry, token_ids)
    layers = tuple(
        LayerKV(file.get_tensor(f"{n}.{i}.keys"), file.get_tensor(f"{n}.{i}.values")) for i in range(entry["layers"])
    )
    if any(tensor.ndim != 4 or tensor.shape[2] != len(token_ids) for layer in layers for tensor in layer):
        raise ValueError(f"entry {n} has KV for another number of tokens than it has ids")
    return Reference(
        id=reference_id(entry["namespace"], token_ids),
        namespace=entry["namespace"],
        token_ids=token_ids,
        layers=layers,
        document_starts=entry["document_starts"],
        document_stops=stops_of(entry),
        segments=tuple(Segment(*segment) for segment in entry["segments"]),
        session=entry["session"],
        pinned=entry["pinned"],
        expires_after_s=entry["expires_after_s"],
        rounded=entry.get("rounded", False),
    )
