"""The arguments that say which engine a command runs on, and the engine that they say."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.modes import MODE_SETTINGS

if TYPE_CHECKING:
    from semsharekv_integrations.engine import SemShareEngine

DEFAULT_MODEL = "semsharekv/reference"


def add_engine_arguments(
    parser: argparse.ArgumentParser, *, default: str | None = DEFAULT_MODEL, known: str | None = None
) -> None:
    """What names a model, how it is loaded and what it may reuse; ``known`` says what the default is."""
    parser.add_argument("--model", default=default, help=f"folder or hub id (default: {known or DEFAULT_MODEL})")
    parser.add_argument("--mode", choices=MODE_SETTINGS, default="auto", help="what may be reused (default: auto)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help="torch dtype, or auto for that of the weights (default)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, for machines")


def load_engine(args: argparse.Namespace) -> SemShareEngine:
    """The engine for ``args``, with its weights in memory."""
    with _busy(f"Loading {args.model}", quiet=args.json):
        from semsharekv_integrations.engine import SemShareEngine
        from semsharekv_integrations.model.loading import hide_progress_bars

        hide_progress_bars()
        config = EngineConfig(reuse=ReuseConfig(mode=args.mode))
        engine = SemShareEngine.from_pretrained(args.model, config, device=args.device, dtype=args.dtype)
        _ = engine.model
    return engine


@contextmanager
def _busy(title: str, *, quiet: bool) -> Iterator[None]:
    """Something moves on standard error's terminal, and vanishes when done."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(title):
        yield
