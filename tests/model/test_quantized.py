"""Quantized weights, which are no plain tensors: everything that reads weights reads these too."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ModelLoadError, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.layers import read_embeddings
from semsharekv_integrations.model.state import StateWatch
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


class FourBits(nn.Module):
    """As bitsandbytes keeps four bits: packed bytes as the weight, and their scales in an object at the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        size = weight.abs().amax(1, keepdim=True)
        codes = ((weight / size + 1) * 7.5).round().to(torch.uint8)
        self.weight = nn.Parameter((codes[:, ::2] << 4 | codes[:, 1::2]).view(-1, 1), requires_grad=False)
        inner = SimpleNamespace(absmax=torch.ones(1), code=None, state2=None)
        self.weight.quant_state = SimpleNamespace(absmax=size, code=torch.arange(16) / 7.5 - 1, state2=inner)  # type: ignore[attr-defined]
        self.quant_state = self.weight.quant_state  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        state = self.weight.quant_state  # type: ignore[attr-defined]
        packed = self.weight.view(len(state.absmax), -1)
        codes = torch.stack([packed >> 4, packed & 15], 2).flatten(1)
        return nn.functional.linear(x, state.code[codes.long()] * state.absmax * state.state2.absmax)

    def double(self) -> None:  # type: ignore[override]
        self.weight.quant_state.absmax.mul_(2)  # type: ignore[attr-defined]


class EightBits(nn.Module):
    """As bitsandbytes keeps eight bits: the first pass moves the scales, and each pass leaves something behind."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        size = weight.abs().amax(1)
        self.weight = nn.Parameter((weight / size[:, None] * 127).round().to(torch.int8), requires_grad=False)
        self.weight.SCB = size  # type: ignore[attr-defined]
        self.state = SimpleNamespace(SCB=None, CB=None, subB=None, idx=None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.SCB is not None:  # type: ignore[attr-defined]
            self.state.SCB, self.weight.SCB = self.weight.SCB, None  # type: ignore[attr-defined]
        self.state.idx = x.abs().amax((0, 1)).topk(2).indices
        self.state.subB = torch.rand(3)
        return nn.functional.linear(x, self.weight.float() * self.state.SCB[:, None] / 127)

    def double(self) -> None:  # type: ignore[override]
        self.weight.SCB.mul_(2)  # type: ignore[attr-defined]


class Buffers(nn.Module):
    """As GPTQ and AWQ keep it: no weight but buffers, beside what a kernel needs in this process."""

    handles = count()
    scales: Tensor
    qweight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("scales", weight.abs().amax(1, keepdim=True) / 7)
        self.register_buffer("qweight", (weight / self.scales).round().to(torch.int32))
        self.q_handle, self.temp_dq = next(self.handles), torch.zeros(5)

    def forward(self, x: Tensor) -> Tensor:
        self.temp_dq.numpy()[:] = x.sum()  # as a kernel writes, which counts no version
        return nn.functional.linear(x, self.qweight * self.scales)

    def double(self) -> None:  # type: ignore[override]
        self.scales.mul_(2)


class Described(nn.Module):
    """As HQQ keeps it: the scales in a dict of whatever."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.abs().amax(1, keepdim=True) / 7
        self.W_q = nn.Parameter(((weight / scale).round() + 8).to(torch.uint8), requires_grad=False)
        self.meta: dict[str, Any] = {
            "nbits": 4,
            "scale": scale,
            "zero": {"zero_q": torch.tensor(8.0)},
            "shape": weight.shape,
        }

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.W_q - self.meta["zero"]["zero_q"]) * self.meta["scale"])

    def double(self) -> None:  # type: ignore[override]
        self.meta["scale"].mul_(2)


PACKED: list[Callable[[Tensor], nn.Module]] = [FourBits, EightBits, Buffers, Described]


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.__name__)
def test_packed_weights_are_told_apart_by_their_scales_too(
    kind: Callable[[Tensor], nn.Module], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    models = [make_model("llama", len(tokenizer)) for _ in range(3)]
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.v_proj = kind(layer.self_attn.v_proj.weight.detach())
            layer.mlp.gate_proj = kind(layer.mlp.gate_proj.weight.detach())
    first, same, other = models
    other.model.layers[1].self_attn.v_proj.double()  # the packed values stay as they are
    before = StateWatch(first).get_state().fingerprint
    assert StateWatch(same).get_state().fingerprint == before or kind is EightBits
    config = EngineConfig(ReuseConfig("exact"), StoreConfig(directory=tmp_path))
    said: dict[str, list[int]] = {}
    for name, model in (("first", first), ("same", same), ("other", other)):
        engine = SemShareEngine(model, tokenizer, config)
        found = [engine.generate(TEXT, max_new_tokens=4) for _ in range(2)]
        assert (found[0].report.prefix_tokens > 9) == (name == "same")
        assert found[1].report.prefix_tokens > 9, "calls change no state"
        assert found[0].token_ids == found[1].token_ids
        off = SemShareEngine(model, tokenizer, EngineConfig(ReuseConfig("off")))
        assert found[0].token_ids == off.generate(TEXT, max_new_tokens=4).token_ids
        said[name] = found[0].token_ids
        engine.close()
    assert said["first"] == said["same"]


class ScaledRows(nn.Embedding):
    """Embeddings in eight bits with one scale, as a part of transformers' own FP8 has them."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__(*table.weight.shape)
        self.weight_scale = nn.Parameter(table.weight.detach().abs().max() / 200)
        self.weight = nn.Parameter((table.weight.detach() / self.weight_scale).to(torch.float8_e4m3fn), False)

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.view(torch.uint8)[input].view(torch.float8_e4m3fn).float() * self.weight_scale


class UnpackedAtLook(nn.Module):
    """Embeddings whose ``weight`` is unpacked anew whenever it is asked for, as those of Gemma in few bits."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.packed = nn.Parameter((table.weight.detach() * 40).round().clamp(-127, 127).to(torch.int8), False)
        self.looks = 0

    @property
    def weight(self) -> Tensor:
        self.looks += 1
        return self.packed.float() / 40

    def forward(self, input: Tensor) -> Tensor:
        return self.packed[input].float() / 40


@pytest.mark.parametrize("kind", [ScaledRows, UnpackedAtLook])
@pytest.mark.parametrize("mode", ["exact", "semantic"])
def test_packed_embeddings_are_those_that_the_model_looks_up_and_unpacked_once(
    mode: Any, kind: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model("llama", len(tokenizer))
    model.set_input_embeddings(kind(model.get_input_embeddings()))
    embeddings, ids = model.get_input_embeddings(), torch.tensor([1, 7, 5])
    torch.testing.assert_close(read_embeddings(model)[ids], embeddings(ids).detach(), rtol=0, atol=0)
    adapter = ModelAdapter(model, "exact")
    assert adapter.embedding_matrix is adapter.embedding_matrix
    engine = SemShareEngine(model, tokenizer, EngineConfig(ReuseConfig(mode)))
    first = engine.generate(TEXT, max_new_tokens=4)
    again = engine.generate(TEXT, max_new_tokens=4)
    assert again.token_ids == first.token_ids and again.report.prefix_tokens > 9
    assert getattr(embeddings, "looks", 0) == 0


METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128},
    "awq": {"bits": 4, "group_size": 128, "version": "gemm"},
    "bitsandbytes": {"load_in_4bit": True},
    "aqlm": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_installed_is_named_in_one_line(
    method: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The package that reads such weights is what transformers asks for, at every call."""
    make_model("llama", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **METHODS[method]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = SemShareEngine.from_pretrained(tmp_path)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match=r"its weights cannot be read: ImportError: .*requires .*") as caught:
            engine.generate(TEXT, max_new_tokens=1)
        assert "\n" not in str(caught.value) and not engine.is_loaded
