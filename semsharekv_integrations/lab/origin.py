"""Where committed figures come from: command, commit, versions and machine; and files that are put in place whole.

Knows nothing about what is measured.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

PROGRAM = "semsharekv"
UNKNOWN_COMMIT = "unknown"
_DISTRIBUTIONS = ("semsharekv-integrations", "torch", "transformers")
_OUTPUT_OPTION = "--out"  # left out of a recorded command: it says where the figures went, not what they are


def recorded_command(arguments: Sequence[str] | None = None) -> str:
    """The command line to repeat, without the path that its output went to.

    Args:
        arguments: what followed ``semsharekv``; default: those of this process.
    """
    kept: list[str] = []
    is_path = False
    for argument in sys.argv[1:] if arguments is None else arguments:
        if not (is_path or argument == _OUTPUT_OPTION or argument.startswith(f"{_OUTPUT_OPTION}=")):
            kept.append(argument)
        is_path = argument == _OUTPUT_OPTION
    return shlex.join([PROGRAM, *kept])


def origin(command: str) -> dict[str, Any]:
    """What anyone needs to get the same figures: ``command``, ``commit``, ``uncommitted_changes``, ``versions``.

    The commit is ``"unknown"`` where the package does not run from a checkout of its own.
    """
    is_checkout = bool(_git("ls-files", "__init__.py"))
    return {
        "command": command,
        "commit": _git("rev-parse", "HEAD") if is_checkout else UNKNOWN_COMMIT,
        "uncommitted_changes": is_checkout and bool(_git("status", "--porcelain")),
        "versions": {name: version(name) for name in _DISTRIBUTIONS},
    }


def _git(*arguments: str) -> str:
    """What git prints, run in this folder; nothing if there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def setting_of(model: PreTrainedModel) -> dict[str, Any]:
    """What it runs on: ``dtype``, ``device`` (its name) and ``threads`` of PyTorch."""
    on_gpu = model.device.type == "cuda"
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def write_whole(path: Path, text: str) -> None:
    """Put the whole file in place at once, with the folders above it: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_path.write_text(text, encoding="utf-8")
    partial_path.replace(path)
