"""Libraries of KV over tiny random models, which are saved to folders, as ``semsharekv warm`` takes them by name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.warming import ModelSpec, Summary, warm_folder

DOCUMENTS = {
    "flood.txt": "The flood in Velmar began on Monday at noon, and the mayor asked everybody to stay home.",
    "fire.md": "A fire in Osteck burnt down two barns on the road to the mill; nobody was hurt, the police said.",
    "deep/down/vote.txt": "The vote on the new bridge was put off, as the council could not agree on its cost.",
}
FLOOD, FIRE, VOTE = DOCUMENTS.values()
# Of which the first begins with a document, so that exact prefixes are found as well.
PROMPTS = (
    f"{FLOOD}\n\nQuestion: When did it begin?\nAnswer:",
    f"Read this.\n\n{VOTE}\n\n{FLOOD}\n\nQuestion: What was put off?\nAnswer:",
    f"{FIRE}\n\n{FLOOD}\n\nQuestion: Who was hurt?\nAnswer:",
)
State = dict[str, tuple[int, int, bytes]]


def write_documents(folder: Path, documents: Mapping[str, str] = DOCUMENTS) -> Path:
    """Make ``folder`` one that holds just these documents; return it."""
    shutil.rmtree(folder, ignore_errors=True)
    for key, text in documents.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    return folder


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Save both to ``folder``; return its name."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def warm(model: str, folder: Path, to: Path, **options: Any) -> Summary:
    """Bring the library ``to`` up to date."""
    return warm_folder(folder, to, ModelSpec(model, "cpu"), **options)


def open_engine(model: str, mode: Any = "exact", **store: Any) -> SemShareEngine:
    """Return an engine for a saved model, with a store of these settings."""
    return SemShareEngine.from_pretrained(model, EngineConfig(ReuseConfig(mode), StoreConfig(**store)), device="cpu")


def answer(engine: SemShareEngine, **options: Any) -> list[tuple[Any, ...]]:
    """Return for each prompt the answer's tokens and all that its report counts."""
    said = []
    for prompt in PROMPTS:
        done = engine.generate(prompt, max_new_tokens=4, **options)
        report = done.report
        counted = (report.prefix_tokens, report.identical_tokens, report.fuzzy_tokens, report.recomputed_tokens)
        said.append((done.token_ids, counted, report.compute_ratio))
    return said


def photograph(folder: Path) -> State:
    """Return mode, date and bytes of everything in a folder, and of itself."""
    found = [folder, *folder.rglob("*")]
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in found
    }
