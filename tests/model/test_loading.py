"""Options and folders reach configuration, tokenizer and weights alike: what transformers loads, the engine loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from semsharekv_integrations import ModelLoadError, SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM
from semsharekv_integrations.llama_index import SemShareKVLLM as LlamaIndexLLM
from semsharekv_integrations.model.loading import NamedModel, merge_arguments
from tiny_models import make_model

PROMPT = "The mayor of Velmar"
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that no other folder has, with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama", len(tokenizer), num_hidden_layers=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of ``folder`` that changes what the model says."""
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(path)
    return path


def cached(folder: Path, cache: Path, name: str, revision: str = "main") -> dict[str, Any]:
    """Options to read a copy of ``folder`` from a hub's cache, as ``name``, of which it has one revision."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)
    where = {"cache_dir": str(cache), "local_files_only": True}
    return where if revision == "main" else where | {"revision": revision}


def logits_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tokenizer(PROMPT, return_tensors="pt")).logits


def assert_loads_as(
    expected: Any, name: str | Path, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Configuration, tokenizer and weights of ``name`` are those of ``expected``, however they are asked for."""
    source = NamedModel(name, None, "auto", options)
    assert source.config.num_hidden_layers == expected.config.num_hidden_layers
    assert source.tokenizer.get_vocab() == tokenizer.get_vocab()
    torch.testing.assert_close(logits_of(source.load(), tokenizer), logits_of(expected, tokenizer), rtol=0, atol=0)
    whole = SemShareEngine(expected, tokenizer).generate(PROMPT, max_new_tokens=4).text
    given: dict[str, Any] = {"model": name, "model_kwargs": options, "max_tokens": 4}
    assert SemShareKVLLM(**given).invoke(PROMPT) == whole
    assert LlamaIndexLLM(**given, is_chat_model=False).complete(PROMPT).text == whole
    assert ChatSemShareKV(**given).engine.context_window == expected.config.max_position_embeddings


@pytest.mark.parametrize("kind", ["path", "home", "subfolder", "cache", "revision", "cached subfolder"])
def test_what_says_where_files_are_reaches_all_of_them(
    kind: str, folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name: str | Path = folder
    options: dict[str, Any] = {}
    if kind == "home":
        monkeypatch.setenv("HOME", str(folder.parent))
        name = f"~/{folder.name}"
    elif "subfolder" in kind:
        shutil.copytree(folder, tmp_path / "repo" / "fp32")
        name, options = tmp_path / "repo", {"subfolder": "fp32"}
    if "cache" in kind or kind == "revision":
        options |= cached(Path(name), tmp_path / "cache", "acme/news", "v1" if kind == "revision" else "main")
        name = "acme/news"
    assert_loads_as(AutoModelForCausalLM.from_pretrained(folder), name, options, tokenizer)


@pytest.mark.parametrize("kind", ["path", "subfolder", "cache", "revision", "base in the cache"])
def test_adapters_bring_their_base(
    kind: str, adapter: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(logits_of(expected, tokenizer), logits_of(plain, tokenizer))
    name: str | Path = adapter
    options: dict[str, Any] = {}
    if kind == "subfolder":
        shutil.copytree(adapter, tmp_path / "repo" / "lora")
        name, options = tmp_path / "repo", {"subfolder": "lora"}
    elif kind in ("cache", "revision"):
        options = cached(adapter, tmp_path / "cache", "acme/lora", "v1" if kind == "revision" else "main")
        name = "acme/lora"
    elif kind == "base in the cache":
        options = cached(folder, tmp_path / "cache", "acme/news")
        name = shutil.copytree(adapter, tmp_path / "lora")
        written = json.loads((name / "adapter_config.json").read_text())
        (name / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": "acme/news"}))
    assert_loads_as(expected, name, options, tokenizer)


def test_an_adapter_s_own_tokenizer_goes_first(
    adapter: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own = shutil.copytree(adapter, tmp_path / "adapter")
    longer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    longer.add_tokens(["<|never seen|>"])
    longer.save_pretrained(own)
    assert NamedModel(own, None, "auto", {}).tokenizer.get_vocab() == longer.get_vocab()
    assert NamedModel(adapter, None, "auto", {}).tokenizer.get_vocab() == tokenizer.get_vocab()


def test_parts_of_an_adapter_that_transformers_overlooks_are_loaded(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """DoRA's magnitudes, which are as if untrained without this."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM", init_lora_weights=False)
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).eval()
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "magnitude" in name:
                weight.mul_(1.7)
    trained.save_pretrained(str(tmp_path))
    loaded = NamedModel(tmp_path, None, "auto", {}).load()
    torch.testing.assert_close(logits_of(loaded, tokenizer), logits_of(trained, tokenizer), rtol=1e-4, atol=1e-4)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(name for name in weights if "magnitude" in name)
    save_file(
        {name: weight for name, weight in weights.items() if name != lost}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ModelLoadError, match="the adapter's weights cannot be read: 1 of them are in no file"):
        NamedModel(tmp_path, None, "auto", {}).load()


def test_an_adapter_in_its_model_s_folder_is_loaded_with_it(
    adapter: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    both = shutil.copytree(folder, tmp_path / "both")
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, both)
    assert_loads_as(AutoModelForCausalLM.from_pretrained(adapter), both, {}, tokenizer)


def test_options_that_name_fields_of_the_configuration_change_it(folder: Path) -> None:
    source = NamedModel(folder, None, "auto", {"max_position_embeddings": 99, "attn_implementation": "eager"})
    config = source.load().config
    assert source.config.max_position_embeddings == config.max_position_embeddings == 99
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_is_one_by_whatever_name_and_wherever_it_stands(folder: Path, dtype: Any, name: str) -> None:
    assert SemShareEngine.from_pretrained(folder, **{name: dtype}).model.dtype == torch.bfloat16
    for cls in (SemShareKVLLM, ChatSemShareKV, LlamaIndexLLM):
        assert cls(model=str(folder), model_kwargs={name: dtype}).engine.model.dtype == torch.bfloat16


def test_fields_and_options_must_agree() -> None:
    assert merge_arguments("cpu", "float16", {"device": torch.device("cpu"), "dtype": torch.float16})
    for options in ({"device": "cuda"}, {"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"config": object()}):
        for cls in (SemShareKVLLM, ChatSemShareKV, LlamaIndexLLM):
            with pytest.raises(ValueError, match=rf"{next(iter(options))}.* is .*accepted is"):
                cls(model="some/model", device="cpu", dtype="float16", model_kwargs=options)
