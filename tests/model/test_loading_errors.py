"""What cannot be loaded is said in one line at once: what is wrong, with which file or field, and what is accepted."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    BartConfig,
    BertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    T5Config,
    ViTConfig,
)

from semsharekv_integrations import (
    EngineConfig,
    ModelLoadError,
    ReuseConfig,
    SemShareEngine,
    UnsupportedModelError,
    UnsupportedVersionError,
)
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM
from semsharekv_integrations.llama_index import SemShareKVLLM as LlamaIndexLLM
from semsharekv_integrations.model import files
from tiny_models import make_model

CALLS: dict[str, Callable[..., Any]] = {
    "engine": lambda name, **options: SemShareEngine.from_pretrained(name, **options).generate("Hi", max_new_tokens=2),
    "langchain": lambda name, **options: SemShareKVLLM(model=name, model_kwargs=options).invoke("Hi"),
    "chat": lambda name, **options: ChatSemShareKV(model=name, model_kwargs=options).invoke("Hi"),
    "llama_index": lambda name, **options: LlamaIndexLLM(model=name, model_kwargs=options).complete("Hi"),
}


@pytest.fixture
def folder(llama: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A model and its tokenizer, to be spoilt."""
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub is asked for; it never answers."""
    urls: list[str] = []

    class Session:
        def head(self, url: str, **_: Any) -> None:
            urls.append(url)
            raise ConnectionError("no network")

    monkeypatch.setattr(files, "get_session", Session)
    monkeypatch.setattr(files.constants, "HF_HUB_OFFLINE", False)
    return urls


def failure(name: Any, kind: type[Exception] = ModelLoadError, call: str = "engine", **options: Any) -> str:
    """The one line that loading ``name`` fails with; no other library's error stands behind it."""
    handled = sys.exc_info()[1]  # which an interruption by a trace function may have left, in CPython 3.11
    with pytest.raises(kind) as caught:
        CALLS[call](name, **options)
    error = caught.value
    assert error.__cause__ is None and (error.__context__ in (None, handled) or error.__suppress_context__)
    assert "\n" not in str(error) and len(str(error)) < 600
    return str(error)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "name", ["/no/folder", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", "nowhere/", "a/b.gguf"]
)
def test_a_path_that_does_not_exist_is_said_to_be_none(name: str, call: str, asked: list[str]) -> None:
    assert failure(name, call=call) == f"model {name!r} could not be loaded: there is no such file or folder"
    assert not asked


@pytest.mark.parametrize("call", CALLS)
def test_a_hub_that_does_not_answer_is_asked_once(call: str, asked: list[str]) -> None:
    message = failure("acme/news", call=call)
    assert "'acme/news'" in message and "does not answer" in message and len(asked) == 1
    assert "the hub is not asked" in failure("acme/news", call=call, local_files_only=True) and len(asked) == 1


@pytest.mark.parametrize("name", [None, "", 5, b"model"])
def test_a_name_must_be_one(name: Any) -> None:
    with pytest.raises(ValueError, match=r"name_or_path is .*; accepted is a folder, a .gguf file, a hub id or"):
        SemShareEngine.from_pretrained(name)


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return remove


def writing(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        without("model.safetensors")(folder)
        (folder / name).write_bytes(content)

    return write


def halve_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def lose_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def empty_tokenizer(folder: Path) -> None:
    without("tokenizer_config.json", "special_tokens_map.json")(folder)
    Tokenizer(BPE()).save(str(folder / "tokenizer.json"))


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


INDEX = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}).encode()
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no model": (without("config.json"), "there is no model in its folder"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "there is no tokenizer in its folder"),
    "half a tokenizer": (without("tokenizer.json"), "its tokenizer cannot be read"),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
    "a tokenizer without words": (empty_tokenizer, "its tokenizer cannot be read: it has no vocabulary"),
    "truncated config": (lambda folder: (folder / "config.json").write_text("{"), "its configuration cannot be read"),
    "empty config": (lambda folder: (folder / "config.json").write_text("{}"), "its configuration cannot be read"),
    "odd config": (change_config(hidden_size="x"), "its configuration cannot be read.*hidden_size"),
    "unknown kind": (change_config(model_type="none"), "its configuration cannot be read.*none"),
    "generation config": (lambda folder: (folder / "generation_config.json").write_text("["), "generation_config.json"),
    "listed generation config": (writing("generation_config.json", b"[]"), "generation_config.json is damaged"),
    "odd end": (writing("generation_config.json", b'{"eos_token_id": "x"}'), "has eos_token_id 'x'; accepted is"),
    "odd ends": (writing("generation_config.json", b'{"eos_token_id": [1, null]}'), "json has eos_token_id"),
    "no weights": (without("model.safetensors"), "its weights cannot be read"),
    "truncated weights": (halve_weights, "its weights cannot be read"),
    "empty weights": (writing("model.safetensors", b""), "its weights cannot be read"),
    "a tensor missing": (lose_tensor, "its weights cannot be read: 1 of them are in no file: model.norm.weight"),
    "other sizes": (
        change_config(intermediate_size=41),
        "its weights cannot be read: some of them have other sizes than the configuration says",
    ),
    "more layers": (change_config(num_hidden_layers=4), r"its weights cannot be read: \d+ of them are in no file"),
    "missing shard": (writing("model.safetensors.index.json", INDEX), "its weights cannot be read.*00001-of-00002"),
    "damaged index": (writing("model.safetensors.index.json", b"{"), "its weights cannot be read"),
    "garbage pickle": (writing("pytorch_model.bin", b"garbage" * 99), "a pickle file is damaged or holds more than"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_or_damaged_in_a_folder_is_named(fault: str, folder: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(folder)
    assert re.search(message, failure(folder))
    assert str(folder) in failure(folder)


def test_a_folder_s_parts_are_named(folder: Path) -> None:
    assert "no folder 'fp32' (subfolder)" in failure(folder, subfolder="fp32")
    assert "no file 'x.gguf' (gguf_file)" in failure(folder, gguf_file="x.gguf")
    assert "it is a file; accepted is a folder" in failure(folder / "config.json")
    (folder / "x.gguf").write_bytes(b"nothing of the kind")
    assert "'x.gguf' is no GGUF file" in failure(folder / "x.gguf")
    assert "'x.gguf' is no GGUF file" in failure(folder, gguf_file="x.gguf")
    without("config.json")(folder)
    assert "gguf_file may be 'x.gguf'" in failure(folder)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_without_its_readers_names_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (folder / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(f"semsharekv_integrations.model.loading.is_{package}_available", lambda: False)
    assert failure(folder / "x.gguf").endswith(f"pip install {package}")


def test_an_adapter_without_peft_names_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without("config.json")(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/news", "peft_type": "LORA"}')
    monkeypatch.setattr("semsharekv_integrations.model.loading.is_peft_available", lambda: False)
    assert "pip install peft" in failure(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "its adapter_config.json is damaged"),
        ("[]", "names no base_model_name_or_path"),
        ('{"base_model_name_or_path": null}', "names no base_model_name_or_path"),
        ('{"base_model_name_or_path": "/no/base"}', "the base of adapter .*'/no/base' .*no such file or folder"),
    ],
)
def test_an_adapter_without_its_base_says_so(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    assert re.search(message, failure(tmp_path))


SIZES = {"vocab_size": 99, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 9}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=9, num_layers=1, num_heads=2), " but an encoder-decoder"),
        (BartConfig(vocab_size=99, d_model=8), " but an encoder-decoder"),
        (BertConfig(**SIZES), " but an encoder "),
        (DistilBertConfig(vocab_size=99, dim=8, n_heads=2), " but an encoder "),
        (ViTConfig(), " (vit)"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_decoder_is_told_by_its_configuration(
    config: PreTrainedConfig, kind: str, call: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    message = failure(tmp_path, UnsupportedModelError, call)
    assert f"{str(tmp_path)!r} is not a causal language model{kind}" in message


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:x", "", 7.5, torch.device("meta")])
def test_unknown_devices_are_refused_at_once(device: Any) -> None:
    with pytest.raises(ValueError, match=r"device is .*; accepted is None or 'cpu'"):
        SemShareEngine.from_pretrained("some/model", device=device)


@pytest.mark.parametrize("device", ["cuda:99", "cpu:7", torch.device("cuda", 99)])
def test_a_device_that_this_machine_lacks_is_said_before_weights_are_read(device: Any, folder: Path) -> None:
    without("model.safetensors")(folder)
    assert f"device is {str(device)!r}; accepted is None or 'cpu'" in failure(folder, device=device)


def test_a_device_beside_a_device_map_is_refused() -> None:
    with pytest.raises(ValueError, match="device is 'cpu'; accepted is None beside device_map"):
        SemShareEngine.from_pretrained("some/model", device="cpu", device_map="auto")


@pytest.mark.parametrize("dtype", ["float17", "int8", "load", "", None, torch.int64, 16])
def test_unknown_dtypes_are_refused_at_once(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*; accepted is 'auto' or a torch dtype such as"):
        SemShareEngine.from_pretrained("some/model", dtype=dtype)


@pytest.mark.parametrize("call", CALLS)
def test_an_option_that_nothing_knows_is_named(call: str, folder: Path) -> None:
    assert failure(folder, call=call, revison="main").endswith("options: revison is none that loading knows")


@pytest.mark.parametrize("version", ["4.57.1", "5.18.1", "5.25.0", "5.25.0.dev0", "6.0.0"])
def test_a_transformers_that_was_not_tested_is_named(
    version: str, llama: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    for make in (
        lambda: SemShareEngine.from_pretrained("some/model"),
        lambda: SemShareEngine(llama, tokenizer),
        lambda: ChatSemShareKV(model="some/model"),
        lambda: LlamaIndexLLM(model="some/model"),
    ):
        with pytest.raises(UnsupportedVersionError, match=rf"transformers {version} .*tested are 5\.19 to 5\.24"):
            make()


@pytest.mark.parametrize("version", ["5.19.0", "5.24.0", "5.24.3"])
def test_a_transformers_that_was_tested_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    assert not SemShareEngine.from_pretrained("some/model").is_loaded


UNFIT = {  # adapters, and by what each is named
    **{
        f"prompt learning ({kind(num_virtual_tokens=1).peft_type.value})": (kind, {"num_virtual_tokens": 3})
        for kind in (PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig)
    },
    "(alora_invocation_tokens)": (LoraConfig, {"alora_invocation_tokens": [3, 4], "target_modules": ["k_proj"]}),
}


@pytest.mark.parametrize("mode", ["off", "exact"])
@pytest.mark.parametrize("named", UNFIT)
def test_adapters_that_do_more_than_change_layers_are_refused_in_every_mode(
    named: str, mode: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    kind, fields = UNFIT[named]
    model = get_peft_model(make_model("llama", len(tokenizer)), kind(**fields, task_type="CAUSAL_LM"))
    config = EngineConfig(ReuseConfig(mode))
    with pytest.raises(UnsupportedModelError, match=re.escape(named)):
        SemShareEngine(model, tokenizer, config)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text()) | {"base_model_name_or_path": "acme/news"}
    for changes, said in (({}, named), ({"peft_type": "XLORA", "alora_invocation_tokens": None}, "(XLORA)")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(written | changes))
        assert said in failure(tmp_path, UnsupportedModelError, config=config)


def test_a_folder_that_was_mended_loads(folder: Path) -> None:
    shutil.move(folder / "tokenizer.json", folder / "elsewhere")
    engine = SemShareEngine.from_pretrained(folder)
    with pytest.raises(ModelLoadError):
        engine.generate("Hi")
    shutil.move(folder / "elsewhere", folder / "tokenizer.json")
    assert engine.generate("Hi", max_new_tokens=2).token_ids
