"""A GGUF file as an ordinary transformers folder, so that it is dequantized once and not at every start."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

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
        source.load().save_pretrained(part)
        source.tokenizer.save_pretrained(part)
        if not folder.exists():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
