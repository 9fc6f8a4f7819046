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

from semsharekv_integrations.errors import StoreFileError
from semsharekv_integrations.kv import LayerKV, Reference, Segment
from semsharekv_integrations.store.files import tensor_digest
from semsharekv_integrations.store.labels import reference_id, stops_of

FORMAT_VERSION = 2


def write_references(path: Path, references: Sequence[Reference], fingerprint: str) -> int:
    """Write beside ``path``, then rename over it: a reader sees the old file or the new one, never a part.

    All must be exact: approximate KV is never written.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # owner-only permissions
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o600)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return len(references)


def read_references(path: Path, fingerprint: str, device: torch.device) -> list[Reference]:
    """The references in ``path``, on ``device``.

    Raises:
        StoreFileError: if the file is missing, damaged, of another format version or of another model.
    """
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
