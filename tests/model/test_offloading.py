"""Weights that accelerate keeps on disk or host change nothing: every mode says what it says with all in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from test_parity import FIRST
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, UnsupportedModelError
from tiny_models import make_model

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head")
PROMPTS = (FIRST, f"Once more: {FIRST} Why?", f"{FIRST} Then?")
OFFLOADED: dict[str, tuple[str, ...]] = {
    "embeddings and head": ("model.embed_tokens", "lm_head"),
    "all but the norm": tuple(part for part in PARTS if part != "model.norm"),
}


def answers(engine: SemShareEngine) -> list[tuple[list[int], int, int, int]]:
    done = [engine.generate(prompt, max_new_tokens=5, documents={"first": FIRST}) for prompt in PROMPTS]
    counts = [(g.report.prefix_tokens, g.report.identical_tokens, g.report.fuzzy_tokens) for g in done]
    return [(one.token_ids, *count) for one, count in zip(done, counts, strict=True)]


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama", len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def config_of(mode: Any) -> EngineConfig:
    return EngineConfig(ReuseConfig(mode) if mode in ("off", "exact") else ReuseConfig(mode, min_run_tokens=8))


@pytest.mark.parametrize("mode", ["off", "exact", "identical", "semantic", "paper"])
@pytest.mark.parametrize("kind", OFFLOADED)
def test_weights_on_disk_change_nothing(kind: str, mode: str, folder: Path, tmp_path: Path) -> None:
    places = {part: "disk" if part in OFFLOADED[kind] else "cpu" for part in (*PARTS, "model.rotary_emb")}
    options: dict[str, Any] = {"device_map": places, "offload_folder": str(tmp_path)}
    engine = SemShareEngine.from_pretrained(folder, config_of(mode), **options)
    assert any(weight.device.type == "meta" for weight in engine.model.parameters())
    assert answers(engine) == answers(SemShareEngine.from_pretrained(folder, config_of(mode), device="cpu"))


@pytest.mark.parametrize("place", ["host", "disk"])
def test_models_that_were_offloaded_by_hand_run_too(
    place: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    expected = answers(SemShareEngine(make_model("llama", len(tokenizer)), tokenizer, config_of("identical")))
    model = make_model("llama", len(tokenizer))
    model = cpu_offload(model, "cpu") if place == "host" else disk_offload(model, str(tmp_path), "cpu")
    assert answers(SemShareEngine(model, tokenizer, config_of("identical"))) == expected


@pytest.mark.parametrize("mode", ["off", "exact"])
def test_a_model_without_weights_is_refused(mode: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no weights: they are on device 'meta'"):
        SemShareEngine(model, tokenizer, config_of(mode))
