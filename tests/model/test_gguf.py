"""A GGUF file, once converted: the same model and tokenizer as transformers reads from the file itself."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.model.files import read_gguf_once
from semsharekv_integrations.model.loading import NamedModel, convert

gguf = pytest.importorskip("gguf")
LAYERS, HEADS, HIDDEN, WORDS = 2, 2, 64, ["<|end|>", "a", "b", "c", "ab", "abc"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A Llama with random quantized weights, and a vocabulary of its own."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] + [1] * (len(WORDS) - 1))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd", len(WORDS), HIDDEN)
    add("output_norm", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            add(f"blk.{layer}.{name}", HIDDEN, HIDDEN)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_converting_keeps_every_bit_reads_the_file_once_and_leaves_gguf_as_it_was(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = NamedModel(str(path), "cpu", torch.bfloat16, {})
    weights, tokenizer = plain.load().state_dict(), plain.tokenizer
    opened: list[Any] = []
    read = gguf.GGUFReader.__init__

    def open_file(*given: Any) -> None:
        opened.append(given)
        read(*given)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", open_file)
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    convert(path, tmp_path / "converted")
    assert len(opened) == 1 and before == (gguf.GGUFReader, gguf.get_tensor_name_map)
    source = NamedModel(tmp_path / "converted", "cpu", "auto", {})
    converted = source.load().state_dict()
    assert converted.keys() == weights.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(converted[name], weight), name
    assert source.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert source.tokenizer("abcab").input_ids == tokenizer("abcab").input_ids == [5, 4]


def test_a_model_of_unpacked_weights_is_an_ordinary_one(path: Path, tmp_path: Path) -> None:
    """It can be cast, moved and written again as one that never was quantized."""
    model = NamedModel(str(path), "cpu", torch.bfloat16, {}).load()
    wider = {name: weight.float() for name, weight in model.state_dict().items()}
    model = model.to(torch.float32)
    assert all(torch.equal(weight, wider[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_prefix_is_reused_and_the_answer_is_that_of_a_full_prefill(path: Path) -> None:
    given: list[tuple[Path, dict[str, str]]] = [(path, {}), (path.parent, {"gguf_file": path.name})]
    for name, options in given:
        exact, off = (
            SemShareEngine.from_pretrained(name, EngineConfig(ReuseConfig(mode)), **options)
            for mode in ("exact", "off")
        )
        exact.generate("abcab" * 9, max_new_tokens=1)
        found = exact.generate("abcab" * 9 + "bca", max_new_tokens=4)
        assert found.token_ids == off.generate("abcab" * 9 + "bca", max_new_tokens=4).token_ids
        assert found.report.prefix_tokens > 9


def test_a_conversion_that_fails_leaves_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)  # behind the weights
    with pytest.raises(OSError, match="No space left"):
        convert(path, tmp_path / "kept" / "converted")
    assert list((tmp_path / "kept").iterdir()) == []


def test_what_was_converted_meanwhile_stays_and_its_owner_alone_reads_it(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept" / "converted"
    convert(path, folder)
    assert folder.parent.stat().st_mode & 0o077 == folder.stat().st_mode & 0o077 == 0
    before = {file.name: file.stat().st_ino for file in folder.iterdir()}
    convert(path, folder)
    assert {file.name: file.stat().st_ino for file in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_two_conversions_at_once_leave_gguf_as_it_was(path: Path, tmp_path: Path) -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    plain = NamedModel(str(path), "cpu", torch.bfloat16, {}).load().state_dict()
    both = threading.Barrier(2)

    def convert_one(name: str) -> dict[str, torch.Tensor]:
        both.wait(60)
        convert(path, tmp_path / name)
        return NamedModel(tmp_path / name, "cpu", "auto", {}).load().state_dict()

    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(convert_one, ("one", "other")), *pool.map(convert_one, ("same", "same"))]
    assert before == (gguf.GGUFReader, gguf.get_tensor_name_map)
    assert all(torch.equal(weights[name], weight) for weights in found for name, weight in plain.items())


def test_one_thread_at_a_time_replaces_names_of_gguf() -> None:
    before, both = gguf.GGUFReader, threading.Barrier(2)

    def enter_often(_: int) -> bool:
        both.wait(60)
        kept = True
        for _ in range(300):
            with read_gguf_once():
                mine = gguf.GGUFReader
                with read_gguf_once():
                    kept &= gguf.GGUFReader is mine is not before
                kept &= gguf.GGUFReader is mine
        return kept

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(enter_often, range(2)))
    finally:
        sys.setswitchinterval(interval)
    assert gguf.GGUFReader is before
