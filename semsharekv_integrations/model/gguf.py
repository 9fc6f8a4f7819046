"""A GGUF file as an ordinary transformers folder, so that it is dequantized once and not at every start."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semsharekv_integrations.model.loading import NamedModel


def convert(path: Path, folder: Path) -> None:
    """Write ``folder``, whole or not at all, readable by its owner alone. Weights are kept in bfloat16.

    Raises:
        OSError: if the folder cannot be written.
        ModelLoadError: if the file cannot be read, or is no model that transformers reads.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix="part-", dir=folder.parent))
    try:
        source = NamedModel(str(path), "cpu", torch.bfloat16, {})
        with _reading_once():
            source.load().save_pretrained(part)
            source.tokenizer.save_pretrained(part)
        if not folder.exists():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _reading_once() -> Iterator[None]:
    """Let transformers, which asks gguf for a file's content three times and for a name map per module, ask once."""
    import gguf

    class Reader(gguf.GGUFReader):
        """Slices a plain array, which takes a fifth of the time that slicing a memory map takes."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    names = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    vars(gguf).update(GGUFReader=cache(Reader), get_tensor_name_map=cache(gguf.get_tensor_name_map))
    try:
        yield
    finally:
        vars(gguf).update(names)
