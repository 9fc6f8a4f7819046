"""Quantized weights, which are no plain tensors: everything that reads weights reads these too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.model.layers import read_embeddings
from tiny_models import make_model

torchao = pytest.importorskip("torchao.quantization")
TEXT = "News from Velmar. The mayor of Velmar is Anna Kelsen. Who is the mayor?"


@pytest.fixture(params=["linear", "all"])
def parts(request: pytest.FixtureRequest) -> str:
    """Which weights are quantized: those of linear layers, or the embeddings too."""
    return str(request.param)


def quantized_model(parts: str, size: int, scale: float = 1.0) -> Any:
    """A model of int8 weights; ``scale`` changes a few of them."""
    model = make_model("llama", size)
    model.model.layers[-1].mlp.down_proj.weight.data *= scale
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    if parts == "all":
        config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=torchao.PerAxis(0))
        torchao.quantize_(model, config, filter_fn=lambda module, _: isinstance(module, torch.nn.Embedding))
    return model


def test_embeddings_are_those_that_the_model_looks_up(parts: str) -> None:
    quantized = quantized_model(parts, 99)
    found, ids = read_embeddings(quantized), torch.tensor([1, 7, 5])
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found[ids], quantized.get_input_embeddings()(ids).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["exact", "semantic"])
def test_directories_and_files_serve_the_same_weights_alone(
    parts: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, mode: Any
) -> None:
    quantized, other = (quantized_model(parts, len(tokenizer), scale) for scale in (1.0, 2.0))
    config = EngineConfig(ReuseConfig(mode), StoreConfig(directory=tmp_path / "kept"))
    first = SemShareEngine(quantized, tokenizer, config)
    said = first.generate(TEXT, max_new_tokens=4).token_ids
    assert first.save(tmp_path / "kv") == 1
    first.close()
    for model, reused in ((quantized, True), (other, False)):
        engine = SemShareEngine(model, tokenizer, config)
        again = engine.generate(TEXT, max_new_tokens=4)
        assert (again.report.prefix_tokens > 9) == reused and (again.token_ids == said or not reused)
        engine.close()
    assert SemShareEngine(quantized, tokenizer, EngineConfig(ReuseConfig(mode))).load(tmp_path / "kv") == 1
