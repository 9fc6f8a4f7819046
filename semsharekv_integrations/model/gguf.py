"""A GGUF file as an ordinary transformers folder, so that it is dequantized once and not at every start."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(path: Path, folder: Path) -> None:
    """Write ``folder``, whole or not at all, readable by its owner alone. Weights are kept in bfloat16.

    Raises:
        OSError: if the file cannot be read or the folder not be written.
        ValueError: if it is no model that transformers reads.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix="part-", dir=folder.parent))
    try:
        with redirect_stderr(StringIO()):  # progress bars that nothing else turns off
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            _without_quantization(model).to(torch.bfloat16).save_pretrained(part)
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(part)
        if not folder.exists():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _without_quantization(model: torch.nn.Module) -> torch.nn.Module:
    """A model of the same weights, all of them ordinary numbers, that knows nothing of the file."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
